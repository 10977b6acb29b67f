"""Checks of the shuffle: the certificate, which blocks training, and row counts that add up."""

from collections.abc import Sequence
from typing import Final

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import format_count
from interp_assets.shuffle.refs import certificate_ref, mixed_shard_ref, n_mixed_shards
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store


def _certificate_passed(pipeline: Pipeline, store: Store, _keys: Sequence[str]) -> dict[str, Verdict]:
    hook_points = pipeline.config.harvest.hook_points
    verdicts = {hook_point: load_manifest(store, certificate_ref(pipeline, hook_point)).facts for hook_point in hook_points}
    lowest = {f"lowest_p.{name}": facts["lowest_p"] for name, facts in verdicts.items()}
    sentences = [
        f"the certificate of {hook_point} says no ({store.url}/{certificate_ref(pipeline, hook_point).path}). Read its findings with "
        "`interp inspect`, and materialize the mixed shards again."
        for hook_point, facts in verdicts.items()
        if not facts["passed"]
    ]
    return {"": Verdict(sentences, {**lowest, "verdicts": verdicts})}


def _mixed_row_counts(pipeline: Pipeline, store: Store, _keys: Sequence[str]) -> dict[str, Verdict]:
    n_expected = sum(load_manifest(store, token_shard_ref(pipeline, index)).facts["n_valid"] for index in pipeline.train_indices)
    buckets = range(n_mixed_shards(pipeline))
    found = {
        hook_point: sum(load_manifest(store, mixed_shard_ref(pipeline, hook_point, bucket)).facts["n_rows"] for bucket in buckets)
        for hook_point in pipeline.config.harvest.hook_points
    }
    sentences = [
        f"the mixed shards of {hook_point} hold {format_count(n_rows, 'row')}, the training shards {n_expected:,} valid tokens. Run `interp verify`, "
        "and materialize the mixed shards again."
        for hook_point, n_rows in found.items()
        if n_rows != n_expected
    ]
    return {"": Verdict(sentences, {"expected_rows": n_expected, **{f"rows.{name}": n for name, n in found.items()}})}


CERTIFICATE_PASSED: Final = Check("certificate_passed", "No row lost or doubled, and an order that looks uniform.", _certificate_passed, blocks=True)
MIXED_ROW_COUNTS: Final = Check("mixed_row_counts", "The mixed shards hold as many rows as the training shards have valid tokens.", _mixed_row_counts)
