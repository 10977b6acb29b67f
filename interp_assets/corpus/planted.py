"""Planted rows have no text: their shards, and tables of token positions that say no more than how many rows there are.

Which features rows are made of, `harvest/planted.py` decides; here a row is a token, its number in the shard, and a shard one document.
"""

import hashlib
import json
from typing import Final

import numpy as np

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ConfigError
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.planning.progress import format_count
from interp_assets.storage.manifest import Produced, create_artifact, find_manifest, timed
from interp_assets.storage.store import Store

_NONE: Final = "planted"


def plan_planted(config: PipelineConfig) -> PipelinePlan:
    """Plan shards of planted rows. Raises `ConfigError` when none is left to train on."""
    corpus = config.corpus
    counts = [min(corpus.rows_per_shard, corpus.n_rows - first) for first in range(0, corpus.n_rows, corpus.rows_per_shard)][: corpus.max_shards]
    if len(counts) <= corpus.held_out_shards:
        raise ConfigError(
            f"corpus.held_out_shards is {corpus.held_out_shards}, and planted rows make {format_count(len(counts), 'shard')}: none is "
            "left to train on. Raise corpus.n_rows, or lower corpus.rows_per_shard."
        )
    return PipelinePlan(
        shards=[ShardSource(index=i, fingerprint=f"{_NONE}-{n}", n_documents=1, n_bytes=0, spec={"n_rows": n}) for i, n in enumerate(counts)],
        tokenizer_fingerprint=_NONE,
        model_fingerprint=fingerprint_planting(config),
        hook_widths=dict.fromkeys(config.harvest.hook_points, corpus.width),
        vocabulary_size=corpus.rows_per_shard,
        max_context=corpus.context_length,
    )


def fingerprint_planting(config: PipelineConfig) -> str:
    """Hash what planted rows depend on: it stands where a model's fingerprint does."""
    return hashlib.blake2b(json.dumps([config.corpus.planting(), config.seed], sort_keys=True).encode(), digest_size=16).hexdigest()


@timed
def make_planted_tokens(pipeline: Pipeline, store: Store, index: int) -> Produced:
    """Publish the token positions of a shard of planted rows: one a row, all valid."""
    from interp_assets.corpus.packing import Layout  # noqa: PLC0415 - a plan of planted rows does without transformers, which these bring
    from interp_assets.corpus.tokens import write_tables  # noqa: PLC0415 - as above

    ref = token_shard_ref(pipeline, index)
    if (manifest := find_manifest(store, ref)) is not None:
        return Produced(ref, manifest, is_cached=True)
    rows = np.arange(pipeline.source(index).spec["n_rows"], dtype=np.uint32)
    contexts = rows // np.uint32(pipeline.config.corpus.context_length)
    layout = Layout(rows, contexts, np.zeros_like(rows))
    with create_artifact(store, ref) as art:
        write_tables(art, layout, np.ones(len(rows), np.bool_), [_NONE], [])
        art.facts = {"n_rows": len(rows), "n_valid": len(rows), "n_contexts": int(contexts[-1]) + 1, "n_documents": 1, "n_bytes": 0}
    return art.produced
