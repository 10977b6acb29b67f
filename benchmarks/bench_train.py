"""Training steps of every architecture beside the bare matrix products they need: rows per second and times the floor, in one run.

    python benchmarks/bench_train.py                                        small: ends within 45 s on 2 cores
    python benchmarks/bench_train.py --batch-rows 4096 --d-sae 4096 16384   the sizes of the goals

Sketch before code: with B rows, n = d_in and m = d_sae, a dense step is five products of 2 B n m operations each (encode, decode, and
the gradients of latents, encoder and decoder); that is the floor, measured in the same run with the same data, alternating with ours so
that a busy machine slows both. A TopK-like step needs one dense product and touches k of m latents otherwise: 0.2 of the floor plus
scans of the pre-activations. A step of ours is the whole of `Trainer.train_step`: loss, gradients, clip, Adam, dead counters, log. One
JSON line an architecture:

    name, value, unit      rows per second
    ours, floor            seconds of a step of ours, and of the five products
    ratio_to_floor         ours / floor: times the floor
    ratio_to_best_peer     null: peers are measured by no run yet
    auxk_ratio_to_floor    the same with an eighth of all latents dead (TopK family)

Ratios are of one run on one machine; bare rates are not to be compared between runs.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable

import torch

from interp_assets.config import Architecture, SaeConfig
from interp_assets.train.recipes import RECIPES, make_weights
from interp_assets.train.trainer import Trainer

SPARSE: tuple[Architecture, ...] = ("topk", "batch_topk", "matryoshka_batch_topk")


def make_floor(x: torch.Tensor, d_sae: int) -> Callable[[], None]:
    """Return the five products of a dense step, into tensors that are there already."""
    W = torch.randn(d_sae, x.shape[1])
    latents, x_hat, gradient = torch.empty(len(x), d_sae), torch.empty_like(x), torch.empty_like(W)

    def run() -> None:
        torch.mm(x, W.T, out=latents)
        torch.mm(latents, W, out=x_hat)
        torch.mm(x, W.T, out=latents)
        torch.mm(latents.T, x, out=gradient)
        torch.mm(latents.T, x, out=gradient)

    return run


def make_step(architecture: Architecture, x: torch.Tensor, d_sae: int, k: int, *, dead_share: float = 0.0) -> Callable[[], None]:
    """Return one training step of an SAE whose latents stay dead or alive as they are."""
    n_steps = 1_000_000
    config = SaeConfig(architecture=architecture, d_sae=d_sae, k=k, batch_rows=len(x), n_rows=n_steps * len(x), dead_after_rows=1 << 60)
    generator = torch.Generator().manual_seed(0)
    trainer = Trainer(config, make_weights(config, x, x.shape[1], generator), x.device)
    dead = torch.rand(d_sae, generator=generator) < dead_share

    def run() -> None:
        trainer.rows_since_fired[dead] = 1 << 60
        trainer.train_step(x)

    return run


def time_together(runs: list[Callable[[], None]], seconds: float) -> list[float]:
    """Return the fastest time of each, taken in turns for about `seconds` and at least three times."""
    best = [float("inf")] * len(runs)
    for run in runs:
        run()
    started, n = time.perf_counter(), 0
    while n < 3 or time.perf_counter() - started < seconds:
        for i, run in enumerate(runs):
            begun = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - begun)
        n += 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[4096])
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=1.0, help="per architecture")
    chosen = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    x = torch.randn(chosen.batch_rows, chosen.d_in, generator=torch.Generator().manual_seed(1))
    for d_sae in chosen.d_sae:
        for architecture in RECIPES:
            runs = [make_floor(x, d_sae), make_step(architecture, x, d_sae, chosen.k)]
            if architecture in SPARSE:
                runs.append(make_step(architecture, x, d_sae, chosen.k, dead_share=1 / 8))
            floor, ours, *with_dead = time_together(runs, chosen.seconds)
            line = {
                "name": f"train_{architecture}",
                "value": round(len(x) / ours),
                "unit": "rows/s",
                "ours": round(ours, 5),
                "floor": round(floor, 5),
                "ratio_to_floor": round(ours / floor, 3),
                "ratio_to_best_peer": None,
                "auxk_ratio_to_floor": round(with_dead[0] / floor, 3) if with_dead else None,
                "config": {"d_in": chosen.d_in, "d_sae": d_sae, "batch_rows": len(x), "k": chosen.k, "dtype": "float32"},
                "hardware": hardware,
                "commit": commit,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
