"""A trained SAE and the held-out shards become its measurements: reconstruction, sparsity, and what the subject model loses by it.

1. The stored rows of the held-out shards (valid ones) are encoded and decoded: L0, FVU, firing frequencies, shrinkage (`metrics.py`).
2. The first `MODEL_TOKENS` held-out tokens go through the subject model three times: untouched, with the reconstruction in place of
   every valid row, and with zeros in place of the same rows (so a BOS, which no SAE sees, is left alone by both); SAEs in one place share
   the first and the last. Cross entropy and KL divergence are means over the valid positions that have a next token. A transcoder reads
   its own hook point in the untouched model and is put in place of its target.

    CE recovered = (CE_zero - CE_sae) / (CE_zero - CE_clean)        KL = mean of KL(clean || sae), in nats

FVU, L0 and CE are told apart for ordinary rows and for those of huge norm (`outliers.py`), which dominate the whole.

A model without a language-model head, and a crosscoder, which has no one place, have null there, and the reason
beside it. Formats: `docs/formats/sae_evaluation.md`.
"""

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final, NamedTuple

import polars as pl
import torch
from torch import Tensor

from interp_assets.corpus.tokens import context_offsets, load_tokens
from interp_assets.errors import ArtifactMissingError, ConfigError, InputError, InterpError, NonFiniteError, StoreError
from interp_assets.garcon.device import choose_device
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.outliers import GroupSums, find_outliers, norm_limits
from interp_assets.harvest.refs import OUTLIER_MULTIPLE
from interp_assets.harvest.rows import iter_row_blocks
from interp_assets.harvest.statistics import load_statistics
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import ArtifactWriter, Produced
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.exchange.fit import N_ROWS, Fit
from interp_assets.train.lineage import evaluation_lineage, hook_points_of
from interp_assets.train.metrics import ReconstructionSums
from interp_assets.train.refs import METRICS, MODEL_TOKENS, evaluation_ref
from interp_assets.train.sae import Sae
from interp_assets.train.truth.recovery import measure_recovery

LATENTS: Final = "latents.parquet"
_BLOCK_ROWS: Final = 4096
"""Stored rows that are measured at once: always as many, because sums round by it."""
_LOGIT_TOKENS: Final = 2048
"""Token positions per forward: three tensors of logits over the whole vocabulary are in memory at once."""


class _Contexts(NamedTuple):
    """A batch of contexts, padded on the right."""

    token_ids: Tensor
    is_token: Tensor
    is_valid: Tensor


class ModelSums(NamedTuple):
    """Sums over the measured positions, in nats."""

    n: int
    ce_clean: float
    ce_sae: float
    ce_zero: float
    kl_sae: float
    kl_zero: float


class ModelGroups(NamedTuple):
    """The same over ordinary rows and over outliers."""

    ordinary: ModelSums
    outliers: ModelSums

    @property
    def whole(self) -> ModelSums:
        """The sums over all measured positions."""
        sums: Any = (a + b for a, b in zip(*self, strict=True))
        return ModelSums(*sums)


class _Arm(NamedTuple):
    """An SAE that is measured."""

    config: SaeConfig
    sae: Sae
    limits: dict[str, float]


def evaluate_saes(
    pipeline: Pipeline, store: Store, model: SubjectModel | None, names: Sequence[str], progress: Callable[[int], None] | None = None
) -> dict[str, Produced | InterpError]:
    """Measure SAEs; those that are put in one place share the model's untouched pass and that with zeros: 14 forwards for 12 SAEs instead of 36.

    `progress` advances by stored rows, then by tokens run through the model. Planted rows have no model. Returns for each its artifact, or what kept
    it from being measured: `NonFiniteError` when the model's loss is not finite, `InputError` when the held-out shards have no valid row.
    """
    made: dict[str, Produced | InterpError] = {}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(pipeline.config.sae(name).targets, []).append(name)
    for group in groups.values():
        made |= _evaluate_group(pipeline, store, model, group, progress)
    return {name: made[name] for name in names}


def _evaluate_group(
    pipeline: Pipeline, store: Store, model: SubjectModel | None, names: Sequence[str], progress: Callable[[int], None] | None
) -> dict[str, Produced | InterpError]:
    device = model.device if model else choose_device(pipeline.config.execution.device)
    started_s, made = time.perf_counter(), dict[str, Produced | InterpError]()
    kept: dict[str, dict[str, str]] = {}
    arms: list[_Arm] = []
    sums: dict[str, ReconstructionSums] = {}
    for name in names:
        try:
            kept[name] = trace(Digests(store), evaluation_lineage(pipeline, name))
            if (manifest := find_current(store, evaluation_ref(pipeline, name), kept[name])) is not None:
                made[name] = Produced(evaluation_ref(pipeline, name), manifest, is_cached=True, wall_s=0.0)
                continue
            config = pipeline.config.sae(name)
            arm = _Arm(config, load_sae(pipeline, store, name).to(device), norm_limits(pipeline, store, config))
            sums[name] = _measure_rows(pipeline, store, arm, progress)
        except (ConfigError, StoreError):
            raise  # it would meet them all
        except InterpError as error:
            made[name] = error
        else:
            arms.append(arm)
    reason = "planted rows are no model's"
    if model:
        reason = "" if model.net.get_output_embeddings() is not None and model.is_causal else "the subject model has no causal language-model head"
    if pipeline.config.sae(names[0]).task == "crosscoder":
        reason = "a crosscoder reconstructs several hook points at once"
    measured = [None] * len(arms) if model is None or reason or not arms else _measure_model(pipeline, store, model, arms, progress)
    for arm, found in zip(arms, measured, strict=True):
        name = arm.config.name
        if isinstance(found, InterpError):
            made[name] = found
            continue
        with create_current(store, evaluation_ref(pipeline, name), kept[name]) as art:
            save_evaluation(art, sums[name], found, reason)
            if pipeline.config.corpus.is_planted:
                art.facts |= measure_recovery(pipeline, store, arm.config, arm.sae)._asdict()
        made[name] = art.produced._replace(wall_s=(time.perf_counter() - started_s) / len(arms))
    return made


def _measure_rows(pipeline: Pipeline, store: Store, arm: _Arm, progress: Callable[[int], None] | None) -> ReconstructionSums:
    config, sae, limits = arm
    sums = ReconstructionSums(sae, torch.cat([load_statistics(pipeline, store, name).mean for name in config.targets]))
    for block in iter_held_out_rows(pipeline, store, config):
        sums.add(block.x, block.y, find_outliers(block.by_hook_point, limits))
        if progress is not None:
            progress(block.n_rows)
    if sums.n_rows == 0:
        raise InputError(
            f"The held-out shards {pipeline.held_out_indices} have no valid rows at {config.hook_point}: nothing can be measured. "
            "Raise corpus.held_out_shards, or give `corpus` more text."
        )
    return sums


def measure_fit(pipeline: Pipeline, store: Store, config: SaeConfig, sae: Sae) -> Fit | None:
    """Measure an SAE on the first `N_ROWS` valid held-out rows of its hook points; None where there are none yet."""
    sums = None
    try:
        for x, y, _, _ in iter_held_out_rows(pipeline, store, config):
            if len(x) == 0:
                continue
            sums = sums or ReconstructionSums(sae, y.double().mean(0))
            n_left = N_ROWS - sums.n_rows
            sums.add(x[:n_left], y[:n_left])
            if sums.n_rows >= N_ROWS:
                break
    except ArtifactMissingError:
        return None
    return Fit(sums.n_rows, sums.l0, sums.fvu, sums.median_row_fvu) if sums else None


class HeldOutRows(NamedTuple):
    """The valid rows of one block."""

    x: Tensor
    """What the SAE reads."""
    y: Tensor
    """What it reconstructs."""
    n_rows: int
    """Rows that are stored of the block, valid or not."""
    by_hook_point: dict[str, Tensor]


def iter_held_out_rows(pipeline: Pipeline, store: Store, config: SaeConfig) -> Iterator[HeldOutRows]:
    """Yield the valid held-out rows block by block."""
    hook_points = hook_points_of(config)
    for index in pipeline.held_out_indices:
        is_valid = torch.from_numpy(load_tokens(pipeline, store, index).valid.copy())
        for blocks in zip(*(iter_row_blocks(pipeline, store, name, index, _BLOCK_ROWS) for name in hook_points), strict=True):
            first, n_rows = blocks[0].first_row, len(blocks[0].rows)
            kept = {name: block.rows[is_valid[first : first + n_rows]] for name, block in zip(hook_points, blocks, strict=True)}
            x, y = (torch.cat([kept[name] for name in names], dim=1) for names in (config.sources, config.targets))
            yield HeldOutRows(x, y, n_rows, kept)


def _measure_model(
    pipeline: Pipeline, store: Store, model: SubjectModel, arms: Sequence[_Arm], progress: Callable[[int], None] | None
) -> list[ModelGroups | InterpError]:
    """Return the sums of each SAE, or an error where they are not finite."""
    totals = [torch.zeros(2, 6, dtype=torch.float64) for _ in arms]
    n_left = MODEL_TOKENS
    for batch in _iter_contexts(pipeline, store):
        totals = [total + found for total, found in zip(totals, _measure_contexts(model, arms, batch), strict=True)]
        n_tokens = int(batch.is_token.sum())
        if progress is not None:
            progress(n_tokens * len(arms))
        n_left -= n_tokens
        if n_left <= 0:
            break
    return [_check_sums(model, arm.config, total) for arm, total in zip(arms, totals, strict=True)]


def _check_sums(model: SubjectModel, config: SaeConfig, total: Tensor) -> ModelGroups | InterpError:
    if not bool(torch.isfinite(total).all()):
        return NonFiniteError(
            f"The loss of {model.name} on the held-out shards is not finite ({total.tolist()}) with the SAE {config.name!r} at {config.targets[0]} "
            "in place. Try model.dtype float32, and look at the SAE's training curve."
        )
    return ModelGroups(*(ModelSums(int(n), *sums) for n, *sums in total.tolist()))


def _measure_contexts(model: SubjectModel, arms: Sequence[_Arm], batch: _Contexts) -> Iterator[Tensor]:
    """Yield for each SAE the six sums of `ModelSums` over the ordinary rows and over the outliers of one batch of contexts: `[2, 6]`."""
    token_ids, is_valid = batch.token_ids.to(model.device), batch.is_valid.to(model.device)
    target = arms[0].config.targets[0]
    measured = (is_valid[:, :-1] & batch.is_token[:, 1:].to(model.device)).flatten()
    targets = token_ids[:, 1:].flatten()[measured]

    def log_probabilities(logits: Tensor) -> Tensor:
        return logits[:, :-1].flatten(0, 1)[measured].float().log_softmax(dim=1)

    clean = log_probabilities(model.logits(token_ids, batch.is_token))

    def compare(replace: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return cross entropy and divergence from the untouched model at each position, with the target's rows replaced."""
        patched = log_probabilities(model.logits_with_patch(token_ids, batch.is_token, target, replace))
        return -patched.gather(1, targets[:, None])[:, 0], (clean.exp() * (clean - patched)).sum(1)

    read = {config.hook_point for config, _, _ in arms if config.is_transcoder}
    captured = model.capture(token_ids, batch.is_token, sorted(read)) if read else {}
    ce_clean = -clean.gather(1, targets[:, None])[:, 0]
    ce_zero, kl_zero = compare(lambda rows: torch.where(is_valid[..., None], 0.0, rows))
    for arm in arms:
        is_outlier = torch.zeros_like(is_valid)
        ce_sae, kl_sae = compare(partial(_reconstruct, arm, captured, is_valid, is_outlier))
        columns = (torch.ones_like(targets), ce_clean, ce_sae, ce_zero, kl_sae, kl_zero)
        found, apart = torch.stack([value.double().cpu() for value in columns]), is_outlier[:, :-1].flatten()[measured].cpu()
        yield torch.stack([found[:, ~apart].sum(1), found[:, apart].sum(1)])


def _reconstruct(arm: _Arm, captured: dict[str, Tensor], is_valid: Tensor, is_outlier: Tensor, rows: Tensor) -> Tensor:
    """Return rows with what an SAE makes of them in the place of the valid ones, and note which are outliers."""
    config, sae, limits = arm
    here = {config.targets[0]: rows} | ({config.hook_point: captured[config.hook_point].to(rows.device)} if config.is_transcoder else {})
    x = (here[config.hook_point] if config.is_transcoder else rows).flatten(0, 1).float()
    is_outlier.copy_(find_outliers(here, limits))
    x_hat = sae.reconstruct(x, sae.encode(x)).view(rows.shape).to(rows.dtype)
    return torch.where(is_valid[..., None], x_hat, rows)


def _iter_contexts(pipeline: Pipeline, store: Store) -> Iterator[_Contexts]:
    for index in pipeline.held_out_indices:
        tokens = load_tokens(pipeline, store, index)
        offsets = context_offsets(tokens.contexts).tolist()
        token_ids, valid = torch.from_numpy(tokens.token_ids.astype("int64")), torch.from_numpy(tokens.valid.copy())
        spans = list(pairwise(offsets))
        per_batch = max(1, _LOGIT_TOKENS // pipeline.config.corpus.context_length)
        for first in range(0, len(spans), per_batch):
            chosen = spans[first : first + per_batch]
            yield _Contexts(
                _pad([token_ids[start:stop] for start, stop in chosen]),
                _pad([torch.ones(stop - start, dtype=torch.bool) for start, stop in chosen]),
                _pad([valid[start:stop] for start, stop in chosen]),
            )


def _pad(parts: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def save_evaluation(art: ArtifactWriter, sums: ReconstructionSums, model_sums: ModelGroups | None, reason: str) -> None:
    """Write the files and facts of an evaluation; `reason` says why there are no sums of the model."""
    metrics: dict[str, Any] = {
        **sums.saebench(),
        **_model_sections(model_sums and model_sums.whole),
        "outliers": {
            "norm_multiple": OUTLIER_MULTIPLE,
            "share": sums.outliers.n_rows / sums.n_rows,
            "ordinary": _describe_group(sums.ordinary, model_sums and model_sums.ordinary),
            "outliers": _describe_group(sums.outliers, model_sums and model_sums.outliers),
        },
        "token_stats": {
            "total_tokens_eval_reconstruction": 0 if model_sums is None else model_sums.whole.n,
            "total_tokens_eval_sparsity_variance": sums.n_rows,
        },
        "fvu": sums.fvu,
        "median_row_fvu": sums.median_row_fvu,
        "l0_percentiles": sums.l0_percentiles(),
        "firing_frequency_histogram": sums.frequency_histogram(),
        "no_model_metrics_because": reason or None,
    }
    art.put(METRICS, (json.dumps(metrics, sort_keys=True, indent=1, allow_nan=False) + "\n").encode())
    table = io.BytesIO()
    columns = {
        "latent": pl.Series(range(len(sums.n_fired)), dtype=pl.UInt32),
        **{name: pl.Series(value.numpy()) for name, value in sums.latent_columns().items()},
    }
    pl.DataFrame(columns).write_parquet(table)
    art.put(LATENTS, table.getvalue(), n_rows=len(sums.n_fired))
    art.facts |= {
        "n_rows": sums.n_rows,
        "l0": sums.l0,
        "fvu": sums.fvu,
        "median_row_fvu": sums.median_row_fvu,
        "ce_recovered": metrics["model_performance_preservation"]["ce_loss_score"],
        "kl": metrics["model_behavior_preservation"]["kl_div_with_sae"],
        "dead_share": sums.dead_share,
        "outlier_share": metrics["outliers"]["share"],
        **{f"{key}_{group}": metrics["outliers"][group][key] for group in ("ordinary", "outliers") for key in ("fvu", "l0", "ce_recovered")},
    }


def _describe_group(rows: GroupSums, model_sums: ModelSums | None) -> dict[str, Any]:
    """Return what is told of the ordinary rows, or of the outliers, alone; null where there is nothing to tell it from."""
    performance = _model_sections(model_sums)["model_performance_preservation"]
    return {
        "n_rows": rows.n_rows,
        "fvu": rows.fvu,
        "l0": rows.l0,
        "n_tokens": 0 if model_sums is None else model_sums.n,
        "ce_loss_with_sae": performance["ce_loss_with_sae"],
        "ce_loss_without_sae": performance["ce_loss_without_sae"],
        "ce_recovered": performance["ce_loss_score"],
    }


def _model_sections(sums: ModelSums | None) -> dict[str, dict[str, float | None]]:
    behaviour: dict[str, float | None] = dict.fromkeys(("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"))
    performance: dict[str, float | None] = dict.fromkeys(("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"))
    if sums is not None and sums.n:
        kl_sae, kl_zero = sums.kl_sae / sums.n, sums.kl_zero / sums.n
        ce_clean, ce_sae, ce_zero = sums.ce_clean / sums.n, sums.ce_sae / sums.n, sums.ce_zero / sums.n
        behaviour = {"kl_div_score": _ratio(kl_zero - kl_sae, kl_zero), "kl_div_with_ablation": kl_zero, "kl_div_with_sae": kl_sae}
        performance = {
            "ce_loss_score": _ratio(ce_zero - ce_sae, ce_zero - ce_clean),
            "ce_loss_with_ablation": ce_zero,
            "ce_loss_with_sae": ce_sae,
            "ce_loss_without_sae": ce_clean,
        }
    return {"model_behavior_preservation": behaviour, "model_performance_preservation": performance}


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator and math.isfinite(denominator) else None
