"""Attention heads as assets: statistics and examples of every head, from the tokens and the model alone. Nothing without a section `heads`."""

from collections.abc import Callable
from typing import Final

from interp_assets.corpus.sizes import TEXT_BYTES_PER_TOKEN, TOKEN_BYTES, rows_of
from interp_assets.harvest.heads.checks import MASS_CONSERVED, RECORDS_COMPLETE
from interp_assets.harvest.heads.refs import (
    HEAD_RECORD_VERSION,
    HEAD_SHARDS,
    HEADS_VERSION,
    LAYERS,
    PROMPT_VERSION,
    candidates_lineage,
    candidates_ref,
    examples_lineage,
    examples_ref,
    head_counts,
    head_shards,
    heads_of,
    layer_index,
    model_heads,
    patterns_lineage,
    patterns_ref,
    prompt_ref,
    read_heads,
    records_lineage,
    records_ref,
    tokens_lineage,
    tokens_ref,
)
from interp_assets.harvest.sizes import forward_s, model_bytes
from interp_assets.planning.asset import Asset, Axis, Job, Load, Markdown, Needs, Shown, every, only, same, whole
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.pipeline import Pipeline, shard_index, shard_key
from interp_assets.planning.sections import HeadsConfig
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store

GROUP: Final = "heads"
EDGE_S: Final = 11e-9
"""Seconds that an edge takes beside the forward: its score, exponential and sums."""
CANDIDATE_BYTES, MASS_BYTES, RECORD_BYTES = 8e3, 16.0, 34e3
"""Of a head and shard; of a head and token; of a head."""
ON_ACCELERATOR: Final = Needs(accelerator=True)
_HELD_TOKEN_BYTES: Final = 14.0
"""A token of all shards in memory, with its place in the text."""


def make_head_assets(config: PipelineConfig) -> list[Asset]:
    """List the assets of attention heads; none without a section `heads`."""
    if config.heads is None:
        return []
    return [*_finding(config.heads), *_showing(config.heads), *([_prompting(config.heads)] if config.heads.prompts else [])]


def _finding(heads: HeadsConfig) -> list[Asset]:
    return [
        Asset(
            key=("head_tokens",),
            group=GROUP,
            kinds=("python", "numpy"),
            description=(
                "The most frequent tokens of the first shard, by which masses of attention are told apart. Later text leaves them as they are. "
                "Look at the share of the text that they make up."
            ),
            reads=(only("token_shards", partitions=[shard_key(0)]),),
            artifacts=lambda pipeline, _store, _key: [tokens_ref(pipeline)],
            lineage=lambda pipeline, _store, _key: tokens_lineage(pipeline),
            make=_choose,
            shows=lambda _job, _key, made: {"share": made[0].manifest.facts["share"]},
            takes=lambda pipeline, store, _key: Load(0, rows_of(pipeline, store, 0) * TOKEN_BYTES, 4.0 * heads.key_tokens),
            obstacles=find_obstacles,
            code_version=code_version(HEADS_VERSION),
        ),
        Asset(
            key=("head_candidates",),
            group=GROUP,
            kinds=("pytorch", "parquet"),
            description=(
                "What one corpus shard holds of every attention head: where it looks, as exact sums beside chance, and the rows that examples can "
                "come from. The unit of work is a corpus shard, one forward without logits. Look at the map of the heads."
            ),
            axis=HEAD_SHARDS,
            reads=(same("token_shards"), whole("head_tokens")),
            artifacts=lambda pipeline, _store, key: [candidates_ref(pipeline, shard_index(key))],
            lineage=lambda pipeline, _store, key: candidates_lineage(pipeline, shard_index(key)),
            make=_find,
            shows=_map,
            takes=_finding_takes,
            work_kind=lambda config, _key: f"heads {config.model.name}",
            needs=ON_ACCELERATOR,
            checks=(MASS_CONSERVED,),
            code_version=code_version(HEADS_VERSION, heads=read_heads(heads, "candidates")),
        ),
        Asset(
            key=("head_examples",),
            group=GROUP,
            kinds=("python", "parquet"),
            description=(
                "Statistics of one layer's heads over all shards, and the examples that are shown: the strongest, and a uniform choice from each "
                "interval of the row score. The unit of work is a layer. Look at the number of examples."
            ),
            axis=LAYERS,
            reads=(every("head_candidates"),),
            artifacts=lambda pipeline, _store, key: [examples_ref(pipeline, layer_index(key))],
            lineage=lambda pipeline, _store, key: examples_lineage(pipeline, layer_index(key)),
            make=_select,
            shows=lambda _job, _key, made: {name: made[0].manifest.facts[name] for name in ("n_rows", "n_examples")},
            takes=_merging,
            code_version=code_version(HEADS_VERSION, heads=read_heads(heads, "examples")),
        ),
    ]


def _showing(heads: HeadsConfig) -> list[Asset]:
    return [
        Asset(
            key=("example_patterns",),
            group=GROUP,
            kinds=("pytorch", "parquet"),
            description=(
                "The strongest keys of the queries around each example that lies in one shard; only contexts that hold one are run again. "
                "The unit of work is a corpus shard. Look at the number of contexts."
            ),
            axis=HEAD_SHARDS,
            reads=(every("head_examples"), same("token_shards")),
            artifacts=lambda pipeline, _store, key: [patterns_ref(pipeline, shard_index(key))],
            lineage=lambda pipeline, _store, key: patterns_lineage(pipeline, shard_index(key)),
            make=_keep,
            shows=lambda _job, _key, made: {name: made[0].manifest.facts[name] for name in ("n_examples", "n_contexts")},
            takes=_keeping,
            work_kind=lambda config, _key: f"patterns {config.model.name}",
            needs=ON_ACCELERATOR,
            code_version=code_version(HEADS_VERSION, heads=read_heads(heads, "patterns")),
        ),
        Asset(
            key=("head_records",),
            group=GROUP,
            kinds=("python", "json"),
            description=(
                "What a person sees of each head of one layer: statistics beside chance, distances, tokens by lift, examples with their patterns. "
                "The unit of work is a layer. One range request opens one head."
            ),
            axis=LAYERS,
            reads=(same("head_examples"), every("example_patterns"), every("token_shards"), whole("head_tokens")),
            artifacts=lambda pipeline, _store, key: [records_ref(pipeline, layer_index(key))],
            lineage=lambda pipeline, _store, key: records_lineage(pipeline, layer_index(key)),
            make=_write,
            unit="heads",
            shows=lambda _job, _key, made: {"bytes_per_head": made[0].manifest.facts["bytes_per_head"]},
            takes=_writing,
            checks=(RECORDS_COMPLETE,),
            code_version=code_version(HEAD_RECORD_VERSION, heads=read_heads(heads, "records")),
        ),
    ]


def _prompting(heads: HeadsConfig) -> Asset:
    return Asset(
        key=("prompt_patterns",),
        group=GROUP,
        kinds=("pytorch", "json"),
        description=(
            "The whole pattern of every head over one configured text, a byte an edge, for who has no model at hand. The unit of work is a prompt. "
            "Look at the bytes of a head."
        ),
        axis=Axis("prompt", fixed=tuple(heads.prompts)),
        reads=(whole("corpus_plan"),),
        artifacts=lambda pipeline, _store, key: [prompt_ref(pipeline, key)],
        make=_prompt,
        unit="prompts",
        shows=lambda _job, _key, made: {name: made[0].manifest.facts[name] for name in ("n_tokens", "bytes_per_head")},
        takes=_prompting_takes,
        needs=ON_ACCELERATOR,
        code_version=code_version(PROMPT_VERSION, prompts={name: heads.prompt(name).text for name in heads.prompts}),
    )


def find_obstacles(pipeline: Pipeline, _store: Store) -> list[str]:
    """Say why the heads that are asked for cannot be shown: the model's structure tells, before weights are loaded."""
    found, layers = model_heads(pipeline), heads_of(pipeline).layers
    if found.heads_refused:
        return [found.heads_refused]
    if layers == "all" or set(layers) <= set(found.heads):
        return []
    missing = sorted(set(layers) - set(found.heads))
    return [f"`heads.layers` names {missing}, but the layers of {pipeline.config.model.name!r} that attend are {sorted(found.heads)}. Mend the list."]


def _choose(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.harvest.heads.tokens import choose_tokens

    return lambda _key: [choose_tokens(job.pipeline, job.store)]


def _find(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.harvest.heads.candidates import find_head_candidates

    model = job.world.model()
    return lambda key: [find_head_candidates(job.pipeline, job.store, model, shard_index(key), job.progress.advance)]


def _select(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.harvest.heads.examples import select_head_examples

    return lambda key: [select_head_examples(job.pipeline, job.store, layer_index(key))]


def _keep(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.harvest.heads.patterns import keep_patterns

    model = job.world.model()
    return lambda key: [keep_patterns(job.pipeline, job.store, model, shard_index(key), job.progress.advance)]


def _write(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.harvest.heads.records import write_head_records

    return lambda key: [write_head_records(job.pipeline, job.store, layer_index(key), job.progress.advance)]


def _prompt(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.harvest.heads.prompts import keep_prompt

    model, tokenizer = job.world.model(), job.world.tokenizer()
    return lambda key: [keep_prompt(job.pipeline, job.store, model, tokenizer, key)]


def _map(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    import polars as pl

    from interp_assets.harvest.heads.candidates import load_statistics
    from interp_assets.harvest.heads.plots import plot_heads
    from interp_assets.harvest.heads.records import tabulate

    item = made[0]
    tables = [tabulate(layer, load_statistics(job.store, item.ref, item.manifest, layer)) for layer in head_counts(job.pipeline)]
    return {"n_candidates": item.manifest.facts["n_candidates"], "heads": Markdown(plot_heads(pl.concat(tables)))}


def _finding_takes(pipeline: Pipeline, store: Store, key: str) -> Load:
    n_rows, counts = rows_of(pipeline, store, shard_index(key)), head_counts(pipeline)
    n_heads, length = sum(counts.values()), pipeline.config.corpus.context_length
    buffer = max(counts.values(), default=0) * 128.0 * length * 4
    return Load(
        rows=n_rows,
        read_bytes=n_rows * TOKEN_BYTES + n_heads * MASS_BYTES * heads_of(pipeline).key_tokens,  # statistics are read again to be shown
        written_bytes=n_heads * (CANDIDATE_BYTES + MASS_BYTES * heads_of(pipeline).key_tokens),
        n_inputs=4 + 3 * len(counts),
        n_outputs=2 * len(counts) + 1,
        busy_s=forward_s(pipeline, float(n_rows)) + n_heads * n_rows * length / 2 * EDGE_S,
        memory_bytes=model_bytes(pipeline) + buffer,
    )


def _merging(pipeline: Pipeline, _store: Store, key: str) -> Load:
    n_heads, n_shards = head_counts(pipeline).get(layer_index(key), 0), len(head_shards(pipeline))
    n_bytes = n_heads * (CANDIDATE_BYTES + MASS_BYTES * heads_of(pipeline).key_tokens)
    return Load(0, n_bytes * n_shards, n_bytes, 3 * n_shards, 2, memory_bytes=n_bytes * n_shards)


def _keeping(pipeline: Pipeline, store: Store, key: str) -> Load:
    n_rows, config = rows_of(pipeline, store, shard_index(key)), heads_of(pipeline)
    n_heads, n_shards = sum(head_counts(pipeline).values()), max(1, len(head_shards(pipeline)))
    n_examples = n_heads * (config.top_k + config.n_intervals * config.examples_per_interval) / n_shards
    run_again = min(n_rows, n_examples * pipeline.config.corpus.context_length)
    n_inputs = 2 * len(head_counts(pipeline)) + 2
    written = RECORD_BYTES * n_heads / n_shards
    return Load(n_rows, n_rows * TOKEN_BYTES, written, n_inputs, 1, forward_s(pipeline, float(run_again)), model_bytes(pipeline))


def _writing(pipeline: Pipeline, store: Store, key: str) -> Load:
    n_bytes = head_counts(pipeline).get(layer_index(key), 0) * RECORD_BYTES
    n_rows = sum(rows_of(pipeline, store, index) for index in head_shards(pipeline))
    return Load(0, n_bytes + n_rows * TOKEN_BYTES, n_bytes, 4 * len(head_shards(pipeline)), 3, memory_bytes=_HELD_TOKEN_BYTES * n_rows)


def _prompting_takes(pipeline: Pipeline, _store: Store, key: str) -> Load:
    n_tokens, n_heads = len(heads_of(pipeline).prompt(key).text) / TEXT_BYTES_PER_TOKEN, sum(head_counts(pipeline).values())
    written = n_heads * n_tokens * n_tokens / 4
    return Load(0, 0.0, written, 1, 3, forward_s(pipeline, n_tokens), model_bytes(pipeline) + 8 * written)
