"""Measurements on held-out shards against plain formulas, on a tiny language model and a tiny encoder."""

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import InputError, InterpError, NonFiniteError
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.outliers import find_outliers
from interp_assets.harvest.refs import OUTLIER_MULTIPLE, activation_shard_ref, statistics_ref
from interp_assets.harvest.statistics import STATISTICS, ActivationStatistics, as_tensors, measure_rows
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.storage.manifest import Produced, create_artifact, read_file
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import save_tensors
from interp_assets.train.checkpoint import load_sae, save_sae
from interp_assets.train.checks import OUTLIER_ROWS, QUALITY_BOUNDS
from interp_assets.train.evaluate import ModelGroups, _Arm, _measure_model, evaluate_saes, save_evaluation
from interp_assets.train.metrics import ReconstructionSums, max_cosines
from interp_assets.train.refs import evaluation_ref, sae_ref
from interp_assets.train.sae import Sae

TARGET = "mlp_out.1"
HOOK, D_IN, D_SAE, VOCABULARY, CONTEXT = "resid_post.0", 8, 24, 30, 12
LENGTHS = (12, 12, 5, 1)


class World(NamedTuple):
    """A held-out shard with everything that its evaluation reads."""

    pipeline: Pipeline
    store: Store
    model: SubjectModel
    token_ids: np.ndarray
    valid: np.ndarray
    rows: torch.Tensor
    target_rows: torch.Tensor | None = None


def evaluate_sae(pipeline: Pipeline, store: Store, model: SubjectModel, name: str, progress: Callable[[int], None] | None = None) -> Produced:
    """Measure one SAE alone."""
    found = evaluate_saes(pipeline, store, model, [name], progress)[name]
    if isinstance(found, InterpError):
        raise found
    return found


def capture(model: SubjectModel, token_ids: np.ndarray, hook_point: str) -> torch.Tensor:
    """Return the activations of all positions, one context at a time."""
    return torch.cat([model.capture(torch.from_numpy(part.astype("int64"))[None], None, [hook_point])[hook_point][0] for part in split(token_ids)])


def make_model(*, is_causal: bool = True) -> SubjectModel:
    """Build a network of one block with random weights."""
    torch.manual_seed(0)
    if is_causal:
        return SubjectModel(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=D_IN, n_layer=2, n_head=2)))
    return SubjectModel(
        BertModel(BertConfig(vocab_size=VOCABULARY, hidden_size=D_IN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    )


def make_world(*, is_causal: bool = True, all_valid: bool = True, **task: Any) -> World:
    """Publish one held-out shard of ragged contexts, an SAE and statistics; `task` are fields of the SAE's configuration."""
    hook_points = [HOOK, TARGET] if task else [HOOK]
    pipeline = Pipeline(
        make_config(
            {
                "corpus": {"context_length": CONTEXT},
                "harvest": {"hook_points": hook_points, "dtype": "float32"},
                "shuffle": {"passes": 2},
                "saes": [{"name": "demo", "hook_point": HOOK, "d_sae": D_SAE, "k": 4, "architecture": "jump_relu", **task}],
                "features": {"saes": []},
            }
        ),
        PipelinePlan(
            shards=[ShardSource(index=i, fingerprint=str(i), n_documents=1, n_bytes=1, spec={}) for i in range(2)],
            tokenizer_fingerprint="t",
            model_fingerprint="m",
            hook_widths=dict.fromkeys(hook_points, D_IN),
            vocabulary_size=VOCABULARY,
            max_context=CONTEXT,
        ),
    )
    store, model, generator = open_store("memory://"), make_model(is_causal=is_causal), np.random.default_rng(0)
    token_ids = generator.integers(0, VOCABULARY, sum(LENGTHS)).astype(np.uint32)
    contexts = np.repeat(np.arange(len(LENGTHS)), LENGTHS).astype(np.uint32)
    valid = np.concatenate([[False] + [all_valid] * (n - 1) for n in LENGTHS])
    table = io.BytesIO()
    pq.write_table(pa.table({"token_id": token_ids, "context": contexts, "document": contexts, "valid": valid}), table)
    with create_artifact(store, token_shard_ref(pipeline, 0)) as art:
        art.put("tokens.parquet", table.getvalue())
    captured = {name: capture(model, token_ids, name) for name in hook_points}
    for name, rows in captured.items():
        with create_artifact(store, activation_shard_ref(pipeline, name, 0)) as art:
            save_tensors(art, "rows.safetensors", {"rows": rows})
        exact = rows.double()
        statistics = ActivationStatistics(
            len(rows), exact.sum(0), exact.square().sum(0), float(exact.norm(dim=1).sum()), torch.zeros(64, dtype=torch.int64)
        )
        with create_artifact(store, statistics_ref(pipeline, name)) as art:
            save_tensors(art, STATISTICS, as_tensors(statistics))
    width = sum(captured[name].shape[1] for name in pipeline.config.sae("demo").sources)
    b_dec = torch.cat([captured[name].mean(0) for name in pipeline.config.sae("demo").targets])
    scale = float(captured[HOOK].std()) or 1.0  # of a random network: without it nothing would fire
    draw = torch.Generator().manual_seed(1)
    sae = Sae(
        kind="jump_relu",
        W_enc=torch.randn(width, D_SAE, generator=draw) / scale,
        b_enc=torch.randn(D_SAE, generator=draw) * 0.1 - 1,
        W_dec=torch.nn.functional.normalize(torch.randn(D_SAE, len(b_dec), generator=draw), dim=1) * 0.3 * scale,
        b_dec=b_dec,
        threshold=torch.rand(D_SAE, generator=draw) * 0.1,
        k=0,
        W_skip=torch.randn(width, len(b_dec), generator=draw) * 0.1 if task.get("task") == "skip_transcoder" else None,
    )
    with create_artifact(store, sae_ref(pipeline, "demo")) as art:
        save_sae(art, sae, pipeline, pipeline.config.sae("demo"), l0=1.0)
    return World(pipeline, store, model, token_ids, valid, captured[HOOK], captured.get(TARGET))


def split(values):
    """Cut an array of all positions into contexts."""
    return np.split(values, np.cumsum(LENGTHS)[:-1])


def read_metrics(world: World, produced) -> dict:
    """Read the published metrics."""
    return json.loads(read_file(world.store, produced.ref.path, produced.manifest, "metrics.json"))


def test_row_metrics_equal_their_formulas() -> None:
    """Only valid rows count, and nothing depends on how they are cut into blocks."""
    world = make_world()
    produced = evaluate_sae(world.pipeline, world.store, world.model, "demo")
    sae, x = load_sae(world.pipeline, world.store, "demo"), world.rows[torch.from_numpy(world.valid)]
    latents = sae.encode(x)
    error = (x - sae.decode(latents)).square().sum(1)
    facts, metrics = produced.manifest.facts, read_metrics(world, produced)
    assert facts["n_rows"] == len(x) == metrics["token_stats"]["total_tokens_eval_sparsity_variance"]
    assert facts["l0"] == pytest.approx(float((latents > 0).sum(1).double().mean()))
    assert facts["fvu"] == pytest.approx(float(error.sum() / (x - x.mean(0)).square().sum()), rel=1e-5)
    row_fvu = error / (x - world.rows.mean(0)).square().sum(1)
    assert facts["median_row_fvu"] == pytest.approx(float(row_fvu.median()), rel=1e-4)
    assert facts["dead_share"] == pytest.approx(float((latents == 0).all(0).double().mean()))
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(1 - facts["fvu"])
    assert metrics["reconstruction_quality"]["mse"] == pytest.approx(float(error.mean()) / D_IN, rel=1e-5)
    x_hat = sae.decode(latents)
    assert metrics["shrinkage"]["l2_ratio"] == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-5)
    bias = float(x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean())
    assert metrics["shrinkage"]["relative_reconstruction_bias"] == pytest.approx(bias, rel=1e-4)
    assert sum(metrics["firing_frequency_histogram"]["counts"]) + metrics["firing_frequency_histogram"]["n_dead"] == D_SAE
    table = pl.read_parquet(io.BytesIO(read_file(world.store, produced.ref.path, produced.manifest, "latents.parquet")))
    floats = ("max_activation", "encoder_bias", "encoder_norm", "encoder_decoder_cosine_sim", "max_encoder_cosine_sim", "max_decoder_cosine_sim")
    assert table.schema == {"latent": pl.UInt32, "firing_frequency": pl.Float64, **dict.fromkeys((*floats, "threshold"), pl.Float32)}
    np.testing.assert_allclose(table["firing_frequency"].to_numpy(), (latents > 0).double().mean(0).numpy())
    np.testing.assert_allclose(table["max_activation"].to_numpy(), latents.amax(0).numpy(), rtol=1e-6)


CORE: dict[str, set[str]] = {
    "model_behavior_preservation": {"kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"},
    "model_performance_preservation": {"ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"},
    "reconstruction_quality": {"explained_variance", "explained_variance_legacy", "mse", "cossim"},
    "shrinkage": {"l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"},
    "sparsity": {"l0", "l1"},
    "token_stats": {"total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"},
    "misc": {
        *("freq_over_1_percent", "freq_over_10_percent", "normalized_freq_over_1_percent", "normalized_freq_over_10_percent"),
        *("average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim", "frac_alive"),
    },
}
"""The sections and keys of SAEBench's core output."""


def test_every_core_metric_equals_a_plain_reference() -> None:
    """Row by row and latent by latent in Python, in SAEBench's core key names, none missing."""
    world = make_world()
    produced = evaluate_sae(world.pipeline, world.store, world.model, "demo")
    metrics, sae = read_metrics(world, produced), load_sae(world.pipeline, world.store, "demo")
    assert {name: set(metrics[name]) for name in CORE} == CORE
    assert 1 < metrics["sparsity"]["l0"] < D_SAE / 2, "the world must not be trivial"
    x = world.rows[torch.from_numpy(world.valid)].double()
    latents = torch.stack([row * (row > sae.threshold) * (row > 0) for row in sae.pre_activations(x)]).double()
    x_hat = latents @ sae.W_dec.double() + sae.b_dec.double()
    n, counts = len(x), [int((row > 0).sum()) for row in latents]
    errors = [float((a - b) @ (a - b)) for a, b in zip(x, x_hat, strict=True)]
    mean = world.rows.double().mean(0)
    frequency = [sum(float(latents[row, latent]) > 0 for row in range(n)) / n for latent in range(D_SAE)]

    def max_cosine(vectors: torch.Tensor) -> list[float]:
        return [max(float(torch.cosine_similarity(a, b, dim=0)) for j, b in enumerate(vectors) if j != i) for i, a in enumerate(vectors)]

    def average(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    expected = {
        "reconstruction_quality": {
            "explained_variance": 1 - sum(errors) / float((x - x.mean(0)).square().sum()),
            "explained_variance_legacy": 1 - average([error / float((row - mean) @ (row - mean)) for error, row in zip(errors, x, strict=True)]),
            "mse": average(errors) / D_IN,
            "cossim": average([float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(x, x_hat, strict=True)]),
        },
        "shrinkage": {
            "l2_norm_in": average([float(row.norm()) for row in x]),
            "l2_norm_out": average([float(row.norm()) for row in x_hat]),
            "l2_ratio": average([float(b.norm() / a.norm()) for a, b in zip(x, x_hat, strict=True)]),
            "relative_reconstruction_bias": sum(float(b @ b) for b in x_hat) / sum(float(a @ b) for a, b in zip(x, x_hat, strict=True)),
        },
        "sparsity": {"l0": average(counts), "l1": average([float(row.sum()) for row in latents])},
        "misc": {
            "freq_over_1_percent": average([share > 0.01 for share in frequency]),
            "freq_over_10_percent": average([share > 0.1 for share in frequency]),
            "normalized_freq_over_1_percent": sum(share for share in frequency if share > 0.01) / sum(frequency),
            "normalized_freq_over_10_percent": sum(share for share in frequency if share > 0.1) / sum(frequency),
            "average_max_encoder_cosine_sim": average(max_cosine(sae.W_enc.T)),
            "average_max_decoder_cosine_sim": average(max_cosine(sae.W_dec)),
            "frac_alive": average([share > 0 for share in frequency]),
        },
    }
    for section, values in expected.items():
        assert metrics[section] == pytest.approx(values, rel=1e-4), section
    ordered = sorted(counts)
    assert metrics["l0_percentiles"] == {f"p{share}": ordered[min(n - 1, n * share // 100)] for share in (5, 25, 50, 75, 95)}
    histogram = metrics["firing_frequency_histogram"]
    edges = histogram["log10_edges"]
    for (low, high), count in zip(pairwise(edges), histogram["counts"], strict=True):
        is_last = high == edges[-1]
        assert count == sum(share > 0 and (low <= math.log10(share) < high or (is_last and share == 1)) for share in frequency)
    table = pl.read_parquet(io.BytesIO(read_file(world.store, produced.ref.path, produced.manifest, "latents.parquet")))
    np.testing.assert_allclose(table["encoder_norm"], [float(column.norm()) for column in sae.W_enc.T], rtol=1e-5)
    cosines = [float(torch.cosine_similarity(sae.W_enc[:, i], sae.W_dec[i], dim=0)) for i in range(D_SAE)]
    np.testing.assert_allclose(table["encoder_decoder_cosine_sim"], cosines, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(table["max_decoder_cosine_sim"], max_cosine(sae.W_dec), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(table["encoder_bias"], sae.b_enc, rtol=1e-6)
    np.testing.assert_allclose(table["threshold"], sae.threshold, rtol=1e-6)


@pytest.mark.parametrize("task", ["transcoder", "skip_transcoder"])
def test_a_transcoder_is_measured_where_it_writes(task: str) -> None:
    """FVU against the rows of the target; what it makes of the untouched input is put in the target's place, and zeros there are the baseline."""
    world = make_world(task=task, target_hook_point=TARGET)
    produced = evaluate_sae(world.pipeline, world.store, world.model, "demo")
    sae, valid = load_sae(world.pipeline, world.store, "demo"), torch.from_numpy(world.valid)
    assert (sae.W_skip is not None) == (task == "skip_transcoder")
    assert world.target_rows is not None
    x, y = world.rows[valid], world.target_rows[valid]
    y_hat = sae.encode(x) @ sae.W_dec + sae.b_dec + (0 if sae.W_skip is None else x @ sae.W_skip)
    facts, metrics = produced.manifest.facts, read_metrics(world, produced)
    assert facts["fvu"] == pytest.approx(float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum()), rel=1e-4)
    assert metrics["shrinkage"]["l2_norm_in"] == pytest.approx(float(y.norm(dim=1).mean()), rel=1e-4)
    sums, n = np.zeros(3), 0
    for ids, kept in zip(split(world.token_ids), split(world.valid), strict=True):
        tokens, is_kept = torch.from_numpy(ids.astype("int64"))[None], torch.from_numpy(kept)[None, :, None]
        read = world.model.capture(tokens, None, [HOOK])[HOOK][0]
        put = sae.reconstruct(read, sae.encode(read))[None]
        logits = [
            world.model.logits(tokens, None),
            world.model.logits_with_patch(tokens, None, TARGET, lambda rows, put=put, is_kept=is_kept: torch.where(is_kept, put, rows)),
            world.model.logits_with_patch(tokens, None, TARGET, lambda rows, is_kept=is_kept: torch.where(is_kept, 0.0, rows)),
        ]
        for position in np.flatnonzero(kept[:-1]).tolist():
            sums += [-float(value[0, position].log_softmax(0)[int(ids[position + 1])]) for value in logits]
            n += 1
    ce_clean, ce_sae, ce_zero = sums / n
    performance = metrics["model_performance_preservation"]
    assert performance["ce_loss_without_sae"] == pytest.approx(ce_clean, rel=1e-5)
    assert performance["ce_loss_with_sae"] == pytest.approx(ce_sae, rel=1e-5)
    assert performance["ce_loss_with_ablation"] == pytest.approx(ce_zero, rel=1e-5)
    assert abs(ce_sae - ce_clean) > 1e-6
    assert facts["ce_recovered"] == pytest.approx((ce_zero - ce_sae) / (ce_zero - ce_clean), rel=2e-2)


def test_a_crosscoder_is_measured_on_all_its_hook_points_side_by_side() -> None:
    """FVU of the joined rows; the model cannot be asked, because there is no one place to put it."""
    world = make_world(task="crosscoder", more_hook_points=[TARGET])
    produced = evaluate_sae(world.pipeline, world.store, world.model, "demo")
    sae, valid = load_sae(world.pipeline, world.store, "demo"), torch.from_numpy(world.valid)
    assert world.target_rows is not None
    x = torch.cat([world.rows[valid], world.target_rows[valid]], dim=1)
    x_hat = sae.decode(sae.encode(x))
    facts, metrics = produced.manifest.facts, read_metrics(world, produced)
    assert facts["fvu"] == pytest.approx(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-4)
    assert facts["l0"] == pytest.approx(float((sae.encode(x) > 0).sum(1).double().mean()))
    assert (facts["ce_recovered"], facts["kl"]) == (None, None)
    assert metrics["no_model_metrics_because"] == "a crosscoder reconstructs several hook points at once"


def test_model_metrics_equal_one_context_at_a_time() -> None:
    """Padding, positions that are not valid and the last position of a context must not count; a BOS is left alone, by zeros too."""
    world = make_world()
    produced = evaluate_sae(world.pipeline, world.store, world.model, "demo")
    sae = load_sae(world.pipeline, world.store, "demo")
    sums, n = np.zeros(5), 0
    for ids, valid in zip(split(world.token_ids), split(world.valid), strict=True):
        tokens, kept = torch.from_numpy(ids.astype("int64"))[None], torch.from_numpy(valid)

        def reconstruct(rows: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            return torch.where(kept[None, :, None], sae.decode(sae.encode(rows[0]))[None], rows)

        logits = [
            world.model.logits(tokens, None),
            world.model.logits_with_patch(tokens, None, HOOK, reconstruct),
            world.model.logits_with_patch(tokens, None, HOOK, lambda rows, kept=kept: torch.where(kept[None, :, None], 0.0, rows)),
        ]
        clean, patched, zero = (value[0].log_softmax(1) for value in logits)
        for position in range(len(ids) - 1):
            if valid[position]:
                target = int(ids[position + 1])
                divergence = [float((clean[position].exp() * (clean[position] - other[position])).sum()) for other in (patched, zero)]
                sums += [*(-float(value[position, target]) for value in (clean, patched, zero)), *divergence]
                n += 1
    ce_clean, ce_sae, ce_zero, kl_sae, kl_zero = sums / n
    metrics, facts = read_metrics(world, produced), produced.manifest.facts
    performance, behaviour = metrics["model_performance_preservation"], metrics["model_behavior_preservation"]
    assert metrics["token_stats"]["total_tokens_eval_reconstruction"] == n
    assert performance["ce_loss_without_sae"] == pytest.approx(ce_clean, rel=1e-5)
    assert performance["ce_loss_with_sae"] == pytest.approx(ce_sae, rel=1e-5)
    assert performance["ce_loss_with_ablation"] == pytest.approx(ce_zero, rel=1e-5)
    assert facts["ce_recovered"] == pytest.approx((ce_zero - ce_sae) / (ce_zero - ce_clean), rel=1e-2)
    assert facts["kl"] == pytest.approx(kl_sae, rel=1e-4) == behaviour["kl_div_with_sae"]
    assert behaviour["kl_div_score"] == pytest.approx(1 - kl_sae / kl_zero, rel=1e-3)
    assert metrics["no_model_metrics_because"] is None


def test_an_encoder_has_null_model_metrics_and_the_reason() -> None:
    """Zero would look like a perfect or a useless SAE."""
    world = make_world(is_causal=False)
    produced = evaluate_sae(world.pipeline, world.store, world.model, "demo")
    metrics = read_metrics(world, produced)
    assert produced.manifest.facts["ce_recovered"] is None
    assert produced.manifest.facts["kl"] is None
    assert "no causal language-model head" in metrics["no_model_metrics_because"]
    assert math.isfinite(produced.manifest.facts["fvu"])


def test_an_evaluation_is_made_once_with_the_same_bytes() -> None:
    """Like every artifact."""
    world, again = make_world(), make_world()
    seen: list[int] = []
    first = evaluate_sae(world.pipeline, world.store, world.model, "demo", seen.append)
    assert sum(seen) == 2 * sum(LENGTHS)
    assert evaluate_sae(again.pipeline, again.store, again.model, "demo").manifest.digest == first.manifest.digest
    assert evaluate_sae(world.pipeline, world.store, world.model, "demo").is_cached


def test_held_out_shards_without_valid_rows_are_refused() -> None:
    """Dividing by zero would publish numbers that mean nothing."""
    world = make_world(all_valid=False)
    with pytest.raises(InputError, match=r"The held-out shards \[0\] have no valid rows at resid_post.0"):
        evaluate_sae(world.pipeline, world.store, world.model, "demo")


def test_a_model_whose_loss_is_not_finite_is_refused() -> None:
    """JSON has no NaN, and a table of results must not have one."""
    world = make_world()
    with torch.no_grad():
        world.model.net.get_output_embeddings().weight[0, 0] = float("inf")  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(NonFiniteError, match=r"not finite .* resid_post.0"):
        evaluate_sae(world.pipeline, world.store, world.model, "demo")


def test_cosines_are_taken_with_other_vectors_only() -> None:
    """A vector's cosine with itself is 1 and says nothing."""
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    torch.testing.assert_close(max_cosines(vectors), torch.tensor([2**-0.5, 2**-0.5, 0.0]))
    assert max_cosines(vectors[:1]).tolist() == [0.0]


def test_rows_of_huge_norm_are_told_apart_and_a_check_speaks() -> None:
    """An attention sink that is reconstructed makes FVU 0.03 of an SAE that explains little of all other rows."""
    world, draw = make_world(), torch.Generator().manual_seed(3)
    rows = torch.randn(500, D_IN, generator=draw)
    rows[::50] = 300 * torch.nn.functional.normalize(torch.ones(D_IN), dim=0) + torch.randn(10, D_IN, generator=draw)
    limit = OUTLIER_MULTIPLE * measure_rows(rows).median_norm
    assert 10 * float(rows.norm(dim=1).median()) == pytest.approx(limit, rel=0.25)
    direction = torch.ones(D_IN, 1) / D_IN**0.5
    zeros = torch.zeros(1)
    sae = Sae(kind="jump_relu", W_enc=direction, b_enc=zeros, W_dec=direction.T, b_dec=torch.zeros(D_IN), threshold=zeros, k=0)
    is_outlier = find_outliers({HOOK: rows}, {HOOK: limit})
    assert is_outlier.nonzero()[:, 0].tolist() == list(range(0, 500, 50))
    sums = ReconstructionSums(sae, rows.double().mean(0))
    for first in range(0, 500, 128):
        sums.add(rows[first : first + 128], is_outlier=is_outlier[first : first + 128])
    ref = evaluation_ref(world.pipeline, "demo")
    with create_artifact(world.store, ref) as art:
        save_evaluation(art, sums, None, "this is a test")
    facts, latents = art.manifest.facts, sae.encode(rows)
    error = (rows - sae.decode(latents)).double().square().sum(1)
    for name, mask in (("", torch.ones(500, dtype=torch.bool)), ("_ordinary", ~is_outlier), ("_outliers", is_outlier)):
        own = rows[mask].double()
        assert facts[f"fvu{name}"] == pytest.approx(float(error[mask].sum() / (own - own.mean(0)).square().sum()), rel=1e-6)
        assert facts[f"l0{name}"] == pytest.approx(float((latents[mask] > 0).sum(1).double().mean()))
    assert facts["outlier_share"] == 0.02
    assert facts["fvu"] < 0.01
    assert facts["fvu_ordinary"] > 0.5
    for check in (OUTLIER_ROWS, QUALITY_BOUNDS):
        verdicts = check.verdicts(world.pipeline, world.store, ["demo"])
        verdict = verdicts["demo"]
        assert not verdict.passed
        assert verdict.is_warning


def test_cross_entropy_is_told_apart_for_outliers_and_others() -> None:
    """Positions of both kinds add up to all, and without outliers the ordinary ones are all."""
    world = make_world()
    usual = evaluate_sae(world.pipeline, world.store, world.model, "demo").manifest.facts
    assert usual["outlier_share"] == 0
    assert (usual["fvu_ordinary"], usual["ce_recovered_ordinary"], usual["fvu_outliers"]) == (usual["fvu"], usual["ce_recovered"], None)
    median = float(world.rows.norm(dim=1).median())
    model, sae = world.model, load_sae(world.pipeline, world.store, "demo")
    config = world.pipeline.config.sae("demo")
    arms = [_Arm(config, sae, {HOOK: limit}) for limit in (median, math.inf)]
    groups, whole = _measure_model(world.pipeline, world.store, model, arms, None)
    assert isinstance(groups, ModelGroups)
    assert isinstance(whole, ModelGroups)
    assert groups.whole == pytest.approx(whole.ordinary)
    assert whole.outliers.n == 0
    contexts = zip(split(world.valid), split((world.rows.norm(dim=1) > median).numpy()), strict=True)
    assert groups.outliers.n == sum(int((valid & large)[:-1].sum()) for valid, large in contexts)
    assert 0 < groups.outliers.n < whole.ordinary.n


def test_saes_in_one_place_share_the_untouched_model_and_the_zeros() -> None:
    """Each SAE ran the model three times: 36 forwards for 12 SAEs, of which 22 gave what was known. The numbers are those of each alone."""
    names = ["demo", "second", "broken", "third"]

    def make_three() -> World:
        world = make_world()
        arms = [world.pipeline.config.saes[0].model_copy(update={"name": name, "seed": seed}) for seed, name in enumerate(names)]
        pipeline = Pipeline(world.pipeline.config.model_copy(update={"saes": arms}), world.pipeline.plan)
        sae = load_sae(pipeline, world.store, "demo")
        for scale, name in ((0.5, "second"), (0.25, "third"), (math.nan, "broken")):
            with create_artifact(world.store, sae_ref(pipeline, name)) as art:
                save_sae(art, replace(sae, W_dec=sae.W_dec * scale), pipeline, pipeline.config.sae(name), l0=1.0)
        return world._replace(pipeline=pipeline)

    together, alone = make_three(), make_three()
    n_forwards: list[int] = []
    handle = together.model.net.register_forward_hook(lambda *_: n_forwards.append(1))
    found = evaluate_saes(together.pipeline, together.store, together.model, names)
    handle.remove()
    assert len(n_forwards) == 2 + len(names)
    assert isinstance(found["broken"], NonFiniteError)
    for name in ("demo", "second", "third"):
        item = found[name]
        assert isinstance(item, Produced)
        assert item.manifest.digest == evaluate_sae(alone.pipeline, alone.store, alone.model, name).manifest.digest


def test_rows_without_variance_give_numbers() -> None:
    """Equal rows deviate by nothing but rounding, a row at the mean by nothing at all, and a row of zeros has no norm to compare with."""
    world = make_world()
    sae, row = load_sae(world.pipeline, world.store, "demo"), torch.linspace(-3, 5, D_IN) / 7
    for rows in (row.repeat(300, 1), torch.zeros(5, D_IN), torch.cat([row[None], -row[None], torch.zeros(1, D_IN)])):
        sums = ReconstructionSums(sae, rows.double().mean(0))
        sums.add(rows)
        numbers = [sums.fvu, sums.median_row_fvu, *(value for part in sums.saebench().values() for value in part.values())]
        assert all(math.isfinite(value) and abs(value) < 1e6 for value in numbers)
    assert sums.fvu > 0
