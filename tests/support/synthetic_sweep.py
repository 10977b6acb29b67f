"""Invented SAEs with the manifests, table and curves that a sweep of them would have: for pages, and for ten thousand of them."""

import io
import math
from typing import Any

import polars as pl

from interp_assets.planning.config import PipelineConfig, make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource, save_configuration, save_plan
from interp_assets.storage.manifest import create_artifact
from interp_assets.storage.store import Store
from interp_assets.train.refs import MATCHES, LogRow, evaluation_ref, matches_ref, sae_ref, sweep_ref
from interp_assets.train.results.ended import FAILED, save_ended
from interp_assets.train.results.matches import SCHEMA as MATCHED
from interp_assets.train.sweep import CURVES, NO_CURVES, SCHEMA, TABLE, describe_recipe

N_HELD_OUT = 8123
POINT = "resid_post.2"


def build_synthetic_sweep(
    store: Store, *, name: str = "synthetic", ks: tuple[int, ...] = (8, 16, 32, 64), n_seeds: int = 3, n_steps: int = 40
) -> Pipeline:
    """Write a pipeline's folder: `topk` and `relu` at every `k` and seed, one SAE of another hook point, and one that failed."""
    saes: list[dict[str, Any]] = [
        {"name": f"{architecture}-k{k}-seed{seed}", "architecture": architecture, "k": k, "sparsity_coefficient": 100 / k, "seed": seed}
        for architecture in ("topk", "relu")
        for k in ks
        for seed in range(n_seeds)
    ]
    saes += [{"name": "elsewhere", "hook_point": "mlp_out.1", "k": 16}, {"name": "bad", "architecture": "relu", "learning_rate": 9.0}]
    content: dict[str, Any] = {
        "name": name,
        "root": "memory://",
        "harvest": {"hook_points": [POINT, "mlp_out.1"]},
        "shuffle": {"fan_out": 2},
        "features": {"saes": []},
    }
    content["matches"] = {"saes": [f"{architecture}-k{ks[0]}-seed0" for architecture in ("topk", "relu")]}
    config = make_config({**content, "saes": saes})
    pipeline = Pipeline(config, _plan(config))
    save_plan(store, pipeline.plan)
    save_configuration(store, config)
    bad = config.sae("bad")
    save_ended(store, sae_ref(pipeline, bad.name), bad.name, _curve(2.0, 4), status=FAILED, why="The loss of SAE 'bad' is nan at step 5.")
    rows = [_row(pipeline, store, sae.name) for sae in config.saes if sae.name != "bad"]
    curves = [
        pl.DataFrame(_curve(row["fvu"], n_steps), schema=LogRow._fields, orient="row").select(pl.lit(row["name"]).alias("name"), pl.all())
        for row in rows
    ]
    with create_artifact(store, sweep_ref(pipeline)) as art:
        for file, table in ((TABLE, pl.DataFrame(rows, schema=SCHEMA, orient="row")), (CURVES, pl.concat([NO_CURVES, *curves]))):
            buffer = io.BytesIO()
            table.write_parquet(buffer)
            art.put(file, buffer.getvalue(), n_rows=table.height, is_timed=file == TABLE)
        art.facts["n_rows"] = len(rows)
    _write_matches(pipeline, store)
    return pipeline


def fvu_of(k: int, seed: int, *, is_topk: bool) -> float:
    """Return the invented FVU: falling with k, `relu` worse by a tenth, seeds a hundredth apart."""
    return (1.0 if is_topk else 1.1) * 0.8 / math.sqrt(k) + 0.002 * seed


def _write_matches(pipeline: Pipeline, store: Store) -> None:
    """Invent matches of eight latents: the i-th with the one mirrored, ever less alike; the last is not mutual."""
    a, b = pipeline.config.matches.saes if pipeline.config.matches else ["", ""]
    numbers = {"n_latents": 8, "mean_cosine": 0.825, "share_above_0.7": 0.75, "share_above_0.9": 0.25, "share_mutual": 0.875}
    parts, pairs = [], []
    for own, other in ((a, b), (b, a)):
        columns: dict[str, Any] = {"sae": [own] * 8, "other_sae": [other] * 8, "latent": list(range(8)), "other_latent": list(range(7, -1, -1))}
        columns |= {
            "cosine": [1 - 0.05 * i for i in range(8)],
            "is_mutual": [i < 7 for i in range(8)],
            "correlation": [0.99 - 0.1 * i for i in range(8)],
            "paired_latent": list(range(7, -1, -1)),
            "paired_cosine": [1 - 0.05 * i for i in range(8)],
        }
        parts.append(pl.DataFrame({**columns, "n_fired": [10] * 8, "n_other_fired": [12] * 8}, schema=MATCHED))
        pairs.append({"sae": own, "other_sae": other, **numbers})
    with create_artifact(store, matches_ref(pipeline)) as art:
        buffer = io.BytesIO()
        pl.concat(parts).write_parquet(buffer)
        art.put(MATCHES, buffer.getvalue())
        art.facts |= {"n_held_out": 4096, "pairs": pairs}


def _plan(config: PipelineConfig) -> PipelinePlan:
    shards = [ShardSource(index=i, fingerprint=f"text-{i}", n_documents=2, n_bytes=100, spec={}) for i in range(3)]
    widths = dict.fromkeys(config.harvest.hook_points, 64)
    return PipelinePlan(shards=shards, tokenizer_fingerprint="t", model_fingerprint="m", hook_widths=widths, vocabulary_size=50, max_context=32)


def _row(pipeline: Pipeline, store: Store, name: str) -> dict[str, Any]:
    config = pipeline.config.sae(name)
    sae, evaluation = sae_ref(pipeline, name), evaluation_ref(pipeline, name)
    fvu = fvu_of(config.k, config.seed, is_topk=config.architecture != "relu")
    facts: dict[str, Any] = {
        "l0": config.k * (1 + 0.01 * config.seed),
        "fvu": fvu,
        "dead_share": 0.01 * config.seed,
        "ce_recovered": 1 - fvu / 4,
        "kl": fvu / 8,
    }
    manifests = []
    for ref, more in ((sae, {}), (evaluation, {"n_rows": N_HELD_OUT})):
        with create_artifact(store, ref) as art:
            art.facts |= facts | more
        manifests.append(art.manifest)
    trained = {f"train_{key}": facts.get(key, fvu) for key in ("loss", "l0", "fvu", "dead_share")}
    row = {**dict.fromkeys(SCHEMA), **describe_recipe(config), **facts, **trained, "rows_per_s": 1e5, "d_in": 64, "d_out": 64, "kind": "relu"}
    ids = {"sae_id": sae.artifact_id, "sae_path": sae.path, "evaluation_id": evaluation.artifact_id, "evaluation_path": evaluation.path}
    digests = {"sae_digest": manifests[0].digest, "evaluation_digest": manifests[1].digest, "mixed_shards_id": sae.inputs["mixed_shards"]}
    return {**row, "outlier_share": 0.0, **ids, **digests}


def _curve(fvu: float, n_steps: int) -> list[LogRow]:
    return [
        LogRow(step, 100 * step, fvu * (1 + 8 / step), fvu, 0.0, 0.0, 16.0, fvu * (1 + 4 / step), 0.1 / step, 1e-3, 1.0)
        for step in range(1, n_steps + 1)
    ]
