"""Checks of the corpus: the token shards hold what they count."""

from collections.abc import Sequence
from typing import Final

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline, shard_index
from interp_assets.planning.progress import format_count
from interp_assets.storage.manifest import Manifest, load_manifest
from interp_assets.storage.store import Store


def _token_counts(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    return {key: _judge_counts(key, load_manifest(store, token_shard_ref(pipeline, shard_index(key)))) for key in keys}


def _judge_counts(key: str, manifest: Manifest) -> Verdict:
    fault = count_fault(manifest)
    sentences = [f"{key}: {fault}. Materialize it again, or look at its documents."] if fault else []
    return Verdict(sentences, {"valid_rows": manifest.facts["n_valid"], "wrong": fault or "nothing"})


def count_fault(manifest: Manifest) -> str:
    """Say what is wrong with a token shard's counts; empty when nothing is."""
    facts, n_table_rows = manifest.facts, manifest.file("tokens.parquet").n_rows
    if n_table_rows is not None and n_table_rows != facts["n_rows"]:
        return f"tokens.parquet has {format_count(n_table_rows, 'row')}, the facts say {facts['n_rows']:,}"
    if not 0 < facts["n_valid"] <= facts["n_rows"]:
        return f"{facts['n_valid']:,} valid rows of {facts['n_rows']:,}"
    return ""


TOKEN_COUNTS: Final = Check("token_counts", "Every token shard has valid rows, and its counts agree.", _token_counts)
