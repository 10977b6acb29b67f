"""How much of a planted truth Matryoshka and BatchTopK find: an order that papers agree on, over seeds, on two cores.

    make bench-planted QUICK=1                          one seed
    python benchmarks/bench_planted.py --seeds 5        the order that is to be kept: about one CPU minute

Rows are made of 336 features in trees (`corpus.hierarchy`), twice as many as there are latents. A BatchTopK SAE with too few latents lets a child's
latent take over its parent's direction (absorption); Matryoshka's first groups have to reconstruct alone and keep the parents. So Matryoshka is to
have the higher F1 on every seed. One JSON line a seed, with mcc, uniqueness and F1 of both, and one for all of them.
"""

import argparse
import json
import os
import sys
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import torch
from floors import report

from interp_assets.harvest.planted import make_planting, plant_rows
from interp_assets.harvest.statistics import ActivationStatistics
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.sections import CorpusConfig
from interp_assets.train.fold import fold_weights
from interp_assets.train.losses.calibrate import calibrate_threshold
from interp_assets.train.recipes import make_normalization, make_weights
from interp_assets.train.trainer import Trainer
from interp_assets.train.truth.recovery import Recovery, RecoverySums

CORPUS: dict[str, Any] = {
    "source": "planted",
    "features": 336,
    "width": 128,
    "hierarchy": {"roots": 16, "branching": 4, "depth": 2, "probability": 0.2},
    "frequency": {"zipf": 0.5, "most": 0.4, "least": 0.1},
}
SAE: dict[str, Any] = {"d_sae": 168, "k": 6, "batch_rows": 512, "learning_rate": 3e-3, "dead_after_rows": 50_000}
N_STEPS, N_HELD_OUT = 600, 16_384
ARCHITECTURES = ("batch_topk", "matryoshka_batch_topk")


def measure(seed: int, corpus: CorpusConfig, sae: dict[str, Any]) -> dict[str, Recovery]:
    """Train both on the same rows and compare them with the truth on others."""
    planting = make_planting(corpus, seed)
    n_rows = N_STEPS * sae["batch_rows"]
    rows = torch.cat([block.rows for block in plant_rows(corpus, planting, seed, 1, n_rows)])
    held_out = plant_rows(corpus, planting, seed, 0, N_HELD_OUT)
    exact = rows.double()
    norms = float(exact.norm(dim=1).sum())
    statistics = ActivationStatistics(len(rows), exact.sum(0), exact.square().sum(0), norms, torch.zeros(64, dtype=torch.int64))
    normalization = make_normalization([statistics])
    z = normalization.apply(rows)
    found: dict[str, Recovery] = {}
    for architecture in ARCHITECTURES:
        config = SaeConfig.model_validate({"name": "bench", "architecture": architecture, "n_rows": n_rows, "seed": seed, **sae})
        generator = torch.Generator().manual_seed(seed)
        trainer = Trainer(config, make_weights(config, z[:4096], z.shape[1], generator), torch.device("cpu"))
        for x in z.split(config.batch_rows):
            trainer.train_step(x)
        folded = fold_weights(config, trainer.weights, normalization, normalization, (z.shape[1],))
        ready = calibrate_threshold(folded, [rows[:16384]], config.k)
        sums = RecoverySums(ready.W_dec, planting.directions)
        for block in held_out:
            sums.add(ready.encode(block.rows), block.strengths)
        found[architecture] = sums.finish()
    return found


def main() -> int:
    """Measure all seeds; exit 1 when the order is another one on any of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--k", type=int, default=SAE["k"])
    parser.add_argument("--corpus", default="{}", help="fields of the corpus, as JSON")
    parser.add_argument("--sae", default="{}", help="fields of the SAEs, as JSON")
    chosen = parser.parse_args()
    corpus = CorpusConfig.model_validate(CORPUS | json.loads(chosen.corpus))
    f1: list[tuple[float, ...]] = []
    for seed in range(1 if chosen.quick else chosen.seeds):
        found = measure(seed, corpus, {**SAE, "k": chosen.k, **json.loads(chosen.sae)})
        f1.append(tuple(found[name].f1 for name in ARCHITECTURES))
        report({"name": "planted", "seed": seed, **{name: item._asdict() for name, item in found.items()}})
    means = [sum(values) / len(f1) for values in zip(*f1, strict=True)]
    kept = sum(matryoshka > batch for batch, matryoshka in f1)
    report({"name": "planted_order", "value": kept, "unit": f"of {len(f1)} seeds", **dict(zip(ARCHITECTURES, means, strict=True))})
    return 0 if kept == len(f1) else 1


if __name__ == "__main__":
    sys.exit(main())
