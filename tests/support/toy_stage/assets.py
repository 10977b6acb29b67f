"""The lengths of documents as assets: one per shard, and their summary. A whole stage in one file, as small as one can be."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.corpus.sizes import TOKEN_BYTES, count_rows, rows_of
from interp_assets.planning.asset import SHARDS, Asset, Check, Job, Load, Markdown, Shown, Verdict, every, same
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.pipeline import Pipeline, shard_index, shard_key
from interp_assets.storage.manifest import ArtifactRef, Produced, combine_ids, create_artifact, find_made_from, load_manifest, make_ref, read_file
from interp_assets.storage.store import Store

LENGTHS = "lengths.json"


def make_assets(config: PipelineConfig) -> list[Asset]:
    """List the assets of this stage."""
    common: dict[str, Any] = {"group": "lengths", "kinds": ("python", "json"), "code_version": code_version(1, corpus=config.corpus)}
    return [
        Asset(
            key=("document_lengths",),
            description="How many tokens each document of one shard has. The unit of work is a corpus shard. Look at the longest.",
            axis=SHARDS,
            reads=(same("token_shards").remember(),),
            artifacts=lambda pipeline, _store, key: [_lengths_ref(pipeline, shard_index(key))],
            make=_measure,
            shows=lambda _job, _key, made: {"longest": made[0].manifest.facts["longest"]},
            takes=_measuring,
            checks=(Check("has_documents", "Every shard has documents.", _has_documents),),
            **common,
        ),
        Asset(
            key=("length_summary",),
            description="The longest document of each shard, over all shards. Look at the plot.",
            reads=(every("document_lengths").remember(),),
            artifacts=lambda pipeline, _store, _key: [_summary_ref(pipeline)],
            make=_summarize,
            shows=_plot,
            takes=lambda pipeline, store, _key: Load(count_rows(pipeline, store, pipeline.shard_indices), n_inputs=len(pipeline.shard_indices)),
            **common,
        ),
    ]


def _lengths_ref(pipeline: Pipeline, index: int) -> ArtifactRef:
    inputs = {"token_shard": token_shard_ref(pipeline, index).artifact_id}
    return make_ref("document_lengths", "7-lengths", identity={"code": 1}, inputs=inputs, label=shard_key(index))


def _summary_ref(pipeline: Pipeline) -> ArtifactRef:
    inputs = {"lengths": combine_ids([_lengths_ref(pipeline, index).artifact_id for index in pipeline.shard_indices])}
    return make_ref("length_summary", "7-lengths", identity={"code": 1}, inputs=inputs, label="summary")


def _measure(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.corpus.tokens import load_documents  # where a partition is made, not where the record is: it takes a library to load

    def make(key: str) -> list[Produced]:
        ref, source = _lengths_ref(job.pipeline, shard_index(key)), load_manifest(job.store, token_shard_ref(job.pipeline, shard_index(key)))
        if (manifest := find_made_from(job.store, ref, [source])) is not None:
            return [Produced(ref, manifest, is_cached=True, wall_s=0.0)]
        lengths = load_documents(job.pipeline, job.store, shard_index(key)).n_rows.tolist()
        with create_artifact(job.store, ref, made_from=[source]) as art:
            art.put(LENGTHS, json.dumps(lengths).encode(), n_rows=len(lengths))
            art.facts["longest"] = max(lengths)
        assert art.manifest is not None
        job.progress.advance(sum(lengths))
        return [Produced(ref, art.manifest, is_cached=False, wall_s=0.0)]

    return make


def _measuring(pipeline: Pipeline, store: Store, key: str) -> Load:
    n_rows = rows_of(pipeline, store, shard_index(key))
    return Load(n_rows, read_bytes=n_rows * TOKEN_BYTES, written_bytes=100, memory_bytes=n_rows * 8)


def _has_documents(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    counts = {key: load_manifest(store, _lengths_ref(pipeline, shard_index(key))).file(LENGTHS).n_rows or 0 for key in keys}
    return {key: Verdict([] if count else [f"{key} has no document. Look at its text."], {"documents": count}) for key, count in counts.items()}


def _summarize(job: Job) -> Callable[[str], list[Produced]]:
    def make(_key: str) -> list[Produced]:
        ref = _summary_ref(job.pipeline)
        sources = [load_manifest(job.store, _lengths_ref(job.pipeline, index)) for index in job.pipeline.shard_indices]
        if (manifest := find_made_from(job.store, ref, sources)) is not None:
            return [Produced(ref, manifest, is_cached=True, wall_s=0.0)]
        with create_artifact(job.store, ref, made_from=sources) as art:
            art.put("summary.json", json.dumps([source.facts["longest"] for source in sources]).encode(), n_rows=len(sources))
        assert art.manifest is not None
        return [Produced(ref, art.manifest, is_cached=False, wall_s=0.0)]

    return make


def _plot(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.planning.plots import as_markdown, make_figure

    longest = json.loads(read_file(job.store, made[0].ref.path, made[0].manifest, "summary.json"))
    figure, axes = make_figure("shard", "tokens of the longest document")
    axes.bar(range(len(longest)), longest)
    return {"longest": Markdown(as_markdown(figure, "Longest document of each shard"))}
