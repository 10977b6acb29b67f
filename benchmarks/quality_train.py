"""The demo's activations become SAEs of ours and of SAELens, trained on the same rows with the same recipe: FVU, L0 and recovered loss side by side.

    python benchmarks/quality_train.py --peers .peers/bin/python --append results.jsonl          see `bench_train.py` for the environment

Both sides get the same normalised rows in the same batches, the same initial weights, learning rates and coefficients, Adam constants
and clipping, float32. What SAELens trained is brought into our parametrisation, folded by our code, calibrated where the artifact fires
by a threshold, and measured by our evaluation on the held-out shards; so only the training steps differ. One JSON line a case: `ratio`
is ours / SAELens for FVU, L0 and recovered cross entropy.

Some of our recipes take the mean of the squared error over dimensions; SAELens, which takes the sum, is given the mean there. Where its
recipe is another one than ours, `quality_peer.py` gives its classes the paper's, and `as_shipped` shows beside it what SAELens reaches with
its own; `difference` says what the two are. Its TopK family does not keep decoder rows at norm 1: it selects by activation times norm, and so
is the same function.
"""

# ruff: noqa: SLF001 - a measurement without an artifact
# pyright: reportPrivateUsage=false
import argparse
import json
import subprocess
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from floors import report
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp_assets.errors import InterpError
from interp_assets.garcon.subject import load_subject_model
from interp_assets.harvest.outliers import norm_limits
from interp_assets.harvest.statistics import load_statistics
from interp_assets.planning.config import PipelineConfig, SaeConfig, load_config
from interp_assets.planning.demo import demo_config
from interp_assets.planning.options import Architecture
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.shuffle.mixed import open_mixed
from interp_assets.train import evaluate
from interp_assets.train.batches import iter_batches, make_row_order
from interp_assets.train.fold import fold_weights
from interp_assets.train.losses.calibrate import calibrate_threshold
from interp_assets.train.losses.loss import USUAL, Weights
from interp_assets.train.losses.topk import group_ends
from interp_assets.train.recipes import RECIPES, make_normalization, make_weights
from interp_assets.train.trainer import Trainer

COEFFICIENTS: Final[dict[Architecture, float]] = {"relu": 5.0, "gated": 3.0, "jump_relu_tanh": 3.0, "jump_relu_step": 5e-3}
DIFFERENCES: Final[dict[Architecture, str]] = {
    "gated": "as shipped, SAELens weighs the penalty by decoder norms, keeps none, and trains the decoder by the gates' reconstruction too",
    "matryoshka_batch_topk": "as shipped, SAELens takes the sum over prefixes, without the empty one, for their mean with it",
    "jump_relu_step": "as shipped, SAELens keeps no decoder norms",
    "jump_relu_tanh": "as shipped, SAELens trains the threshold and not its logarithm, and only dead latents have the loss on silence",
}
"""Of architectures whose recipe in SAELens is another one. AuxK is off on both sides of the TopK family: SAELens' is not divided by a variance."""
ARCHITECTURES: Final = ("relu", "gated", "topk", "batch_topk", "matryoshka_batch_topk", "jump_relu_tanh", "jump_relu_step")
_NEVER: Final = 1 << 60
_SHOWN: Final = ("d_sae", "k", "batch_rows", "n_rows", "learning_rate", "sparsity_coefficient")


def make_case(chosen: argparse.Namespace, architecture: Architecture) -> SaeConfig:
    """Return the configuration that both sides follow."""
    return SaeConfig.model_validate(
        {
            "architecture": architecture,
            "d_sae": chosen.d_sae,
            "k": chosen.k,
            "batch_rows": chosen.batch_rows,
            "n_rows": chosen.steps * chosen.batch_rows,
            "learning_rate": chosen.learning_rate,
            "sparsity_coefficient": COEFFICIENTS.get(architecture, 0.0),
            "dead_after_rows": _NEVER,
        }
    )


def train_ours(config: SaeConfig, weights: Weights, rows: Tensor) -> Weights:
    """Train on the rows in order."""
    trainer = Trainer(config, weights, torch.device("cpu"))
    for x in rows.split(config.batch_rows):
        trainer.train_step(x)
    return trainer.whole_weights()


def train_theirs(python: str, config: SaeConfig, weights: Weights, rows: Path, *, is_same_recipe: bool) -> Weights:
    """Train by SAELens in its own environment, from the same weights, and bring the result into our parametrisation."""
    d_in = weights["W_enc_T"].shape[1]
    recipe = RECIPES[config.architecture]
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: value.contiguous() for name, value in weights.items()}, f"{folder}/start.safetensors")
        request = {
            "rows": str(rows),
            "start": f"{folder}/start.safetensors",
            "end": f"{folder}/end.safetensors",
            "architecture": config.architecture,
            "d_in": d_in,
            "betas": recipe.betas,
            "epsilon": recipe.epsilon,
            "coefficient_warmup": recipe.coefficient_warmup,
            "learning_rate_warmup": recipe.warmup_share,
            "learning_rate_decay": recipe.decay_share,
            "step_width": USUAL.step_width * d_in**0.5,
            "error_parts": _error_parts(config.architecture, d_in, is_same_recipe=is_same_recipe),
            "is_unit_norm": recipe.is_unit_norm and not recipe.is_sparse,
            "is_same_recipe": is_same_recipe,
            "group_ends": group_ends(config.d_sae),
            "threads": torch.get_num_threads(),
            **config.model_dump(include={"d_sae", "k", "batch_rows", "n_rows", "learning_rate", "sparsity_coefficient"}),
        }
        script = str(Path(__file__).with_name("quality_peer.py"))
        subprocess.run([python, script, json.dumps(request)], check=True)
        found = load_file(request["end"])
    norm = found["W_dec"].norm(dim=1).clamp(min=1e-12)
    return from_sae_lens(config.architecture, found, norm)


def _error_parts(architecture: Architecture, d_in: int, *, is_same_recipe: bool) -> int:
    """Return what SAELens' squared errors, summed over dimensions and over the prefixes of a Matryoshka SAE, are divided by."""
    if not (RECIPES[architecture].is_sparse or architecture == "jump_relu_step"):
        return 1
    return d_in * (len(USUAL.groups) + 1 if architecture == "matryoshka_batch_topk" and is_same_recipe else 1)


def from_sae_lens(architecture: Architecture, found: dict[str, Tensor], norm: Tensor) -> Weights:
    """Rename SAELens' tensors; where we keep decoder rows at norm 1, move their norms to the encoder, which changes no output."""
    weights: Weights = {"W_enc_T": found["W_enc"].T, "W_dec": found["W_dec"], "b_dec": found["b_dec"]}
    if architecture == "gated":
        return weights | {"b_enc": found["b_gate"], "b_mag": found["b_mag"], "r_mag": found["r_mag"]}
    weights["b_enc"] = found["b_enc"]
    if "threshold" in found:
        level = found["threshold"].clamp(min=torch.finfo(torch.float32).tiny)
        weights |= {"threshold": level} if architecture == "jump_relu_step" else {"log_threshold": level.log()}
    if RECIPES[architecture].is_sparse:
        weights |= {"W_enc_T": weights["W_enc_T"] * norm[:, None], "b_enc": weights["b_enc"] * norm, "W_dec": weights["W_dec"] / norm[:, None]}
    return weights


class Bench:
    """The pipeline, its rows, and what measures an SAE on its held-out shards."""

    def __init__(self, config: PipelineConfig, chosen: argparse.Namespace) -> None:
        """Read as many training rows as the steps need, and some to calibrate by."""
        self.store = open_pipeline_store(config)
        self.pipeline = load_pipeline(config, self.store)
        self.hook_point = config.saes[0].hook_point
        self.d_in = self.pipeline.d_in(self.hook_point)
        self.normalization = make_normalization([load_statistics(self.pipeline, self.store, self.hook_point)])
        shards = open_mixed(self.pipeline, self.store, self.hook_point)
        order = make_row_order(shards, config.seed, self.d_in, self.hook_point)
        batches = iter_batches(self.store, shards, order, chosen.batch_rows, range(chosen.steps + 8))
        raw = [batch.rows for batch in islice(batches, chosen.steps + 8)]
        self.rows = torch.cat([self.normalization.apply(rows) for rows in raw[: chosen.steps]])
        self.calibration = raw[chosen.steps :]
        self.model = load_subject_model(config.model, config.execution)

    def measure(self, config: SaeConfig, weights: Weights) -> dict[str, float]:
        """Fold, calibrate and measure."""
        sae = fold_weights(config, weights, self.normalization, self.normalization, (self.d_in,))
        if RECIPES[config.architecture].is_calibrated:
            sae = calibrate_threshold(sae, self.calibration, config.k)
        arm = evaluate._Arm(config, sae, norm_limits(self.pipeline, self.store, config))
        sums = evaluate._measure_rows(self.pipeline, self.store, arm, None)
        (groups,) = evaluate._measure_model(self.pipeline, self.store, self.model, [arm], None)
        if isinstance(groups, InterpError):
            raise groups
        losses = groups.whole
        recovered = (losses.ce_zero - losses.ce_sae) / (losses.ce_zero - losses.ce_clean)
        return {"fvu": sums.fvu, "l0": sums.l0, "ce_recovered": recovered, "dead_share": sums.dead_share}


def compare(bench: Bench, chosen: argparse.Namespace, architecture: Architecture, rows: Path) -> dict[str, Any]:
    """Train and measure one architecture on both sides."""
    config = make_case(chosen, architecture)
    start = make_weights(config, bench.rows[:4096], bench.d_in, torch.Generator().manual_seed(chosen.seed))
    ours = bench.measure(config, train_ours(config, start, bench.rows))

    def measure_theirs(*, is_same_recipe: bool) -> dict[str, float]:
        return bench.measure(config, train_theirs(chosen.peers, config, start, rows, is_same_recipe=is_same_recipe))

    theirs = measure_theirs(is_same_recipe=True)
    shipped = measure_theirs(is_same_recipe=False) if architecture in DIFFERENCES and chosen.as_shipped else {}
    return {
        "name": f"quality_{architecture}",
        "value": round(ours["fvu"] / theirs["fvu"], 4),
        "unit": "FVU of ours / of SAELens",
        "ours": _rounded(ours),
        "sae_lens": _rounded(theirs),
        "as_shipped": _rounded(shipped),
        "ratio": {name: round(ours[name] / theirs[name], 4) for name in ("fvu", "l0", "ce_recovered")},
        "difference": DIFFERENCES.get(architecture, ""),
        "config": {"d_in": bench.d_in, "hook_point": bench.hook_point, "seed": chosen.seed, **config.model_dump(include=set(_SHOWN))},
    }


def _rounded(measures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in measures.items()}


def main() -> None:
    """Compare every chosen architecture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", required=True, help="interpreter of the environment that has sae-lens")
    parser.add_argument("--config", help="a pipeline whose shards are mixed; the demo by default (interp run)")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--as-shipped", action=argparse.BooleanOptionalAction, default=True, help="also train SAELens' own recipe")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-rows", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--append", default="", help="also append the lines to this file")
    chosen = parser.parse_args()
    bench = Bench(load_config(Path(chosen.config)) if chosen.config else demo_config(), chosen)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.safetensors"
        save_file({"rows": bench.rows}, rows)
        for architecture in chosen.architectures:
            report(compare(bench, chosen, architecture, rows), chosen.append)


if __name__ == "__main__":
    main()
