"""A finished shuffle of one hook point becomes a certificate: no row lost, doubled or changed, and an order that looks uniform.

1. *The same rows.* Split jobs hash their rows as they read them, gather jobs as they write them (`multiset.py`); the sums over all jobs
   must be equal. Nothing is read again for it: between the two, every byte is under a checksum. Where newer rows were merged in (`append.py`),
   those that the certificate before counted went in as well.
2. *A uniform order.* The row ids of the mixed shards, 8 bytes a row, go through the battery of `mixing.py`; each finding has a p-value
   under the exact law of a uniform permutation.

**Verdict.** A finding fails below `P_FAIL` = 1e-7. At most ten are judged, so a correct shuffle is refused with probability 1e-6 at most
(some p-values err on the safe side), while the faults that the battery is for give 1e-20 and less at a few thousand rows. Below
`MIN_ROWS` rows the tails of the statistics mean nothing: only the hash is judged. A failing order is a fact (`passed`), which blocks
training by an asset check; rows that are lost or doubled are an error. Format: `docs/formats/shuffle_certificate.md`.
"""

import json
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from interp_assets.corpus.tokens import load_documents
from interp_assets.errors import ArtifactCorruptError, CertificateError
from interp_assets.planning.pipeline import SHARD_SHIFT, Pipeline, shard_key
from interp_assets.planning.progress import Advance, unheard
from interp_assets.shuffle.generations import before, has_grown, newest
from interp_assets.shuffle.mixed import MixedShard, open_mixed, read_mixed_ids
from interp_assets.shuffle.mixing import Finding, LagFinding, Mixing, MixingMeter, SourceLayout
from interp_assets.shuffle.multiset import MultisetHash
from interp_assets.shuffle.plan import ShufflePlan, load_shard_rows, load_shuffle_plan, make_sizes
from interp_assets.shuffle.refs import certificate_ref, list_splits
from interp_assets.shuffle.sources import load_manifests
from interp_assets.storage.manifest import Manifest, Produced, create_artifact, find_made_from, load_manifest, timed
from interp_assets.storage.store import Store

CERTIFICATE: Final = "certificate.json"
FORMAT: Final = "interp-assets/shuffle_certificate"
VERSION: Final = 1
P_FAIL: Final = 1e-7
MIN_ROWS: Final = 1000


@timed
def certify(pipeline: Pipeline, store: Store, hook_point: str, progress: Advance = unheard) -> Produced:
    """Certify the mixed shards of a hook point, in a pipeline that has grown or not. Reads their row ids only; holds those of one shard.

    A verdict on the order is the fact `passed`. Raises `CertificateError` when rows were lost, doubled or changed, and
    `ArtifactMissingError` that names every mixed shard or job file which is missing.
    """
    ref = certificate_ref(pipeline, hook_point)
    shards = open_mixed(pipeline, store, hook_point)
    mixed = [shard.manifest for shard in shards]
    if (manifest := find_made_from(store, ref, mixed)) is not None:
        return Produced(ref, manifest, is_cached=True)
    plan, read = _find_sources(pipeline, store, hook_point, shards)
    after = _merge_facts(store, [(shard.ref.path, shard.manifest) for shard in shards], "multiset_hash")
    meter = MixingMeter(load_layout(pipeline, store, plan), [shard.n_rows for shard in shards])
    for shard in shards:
        meter.add(read_mixed_ids(store, shard, 0, shard.n_rows))
        progress(shard.n_rows)
    mixing = meter.findings()
    if read != after:
        raise CertificateError(_describe_loss(store, hook_point, plan, shards, mixing, read, after))
    content = make_content(plan, mixing, read, after)
    with create_artifact(store, ref, made_from=mixed) as art:
        art.put(CERTIFICATE, (json.dumps(content, indent=1) + "\n").encode())
        art.facts |= {key: value for key, value in content.items() if key not in ("format", "version", "findings", "lags")}
        art.facts["p_values"] = {item["name"]: item["p"] for item in content["findings"]}
    return art.produced


def _find_sources(pipeline: Pipeline, store: Store, hook_point: str, shards: list[MixedShard]) -> tuple[ShufflePlan, MultisetHash]:
    """Return the plan of the rows that went in, and their hash: of older generations as the certificate before counted them."""
    own = newest(pipeline)
    plan = load_shuffle_plan(own, store)
    if not has_grown(pipeline):
        return plan, _hash_read(own, store, hook_point, plan, shards)
    certify(before(pipeline), store, hook_point)  # of other mixed shards, where those were made again
    known = load_manifest(store, certificate_ref(before(pipeline), hook_point)).facts["multiset_hash_before"]
    added = _hash_read(own, store, hook_point, plan, open_mixed(own, store, hook_point))
    rows = load_shard_rows(pipeline, store)
    whole = ShufflePlan(seed=pipeline.config.seed, shards=rows, sizes=make_sizes(pipeline, rows), counts=[])
    return whole, MultisetHash.decode(known).merge(added)


def _hash_read(pipeline: Pipeline, store: Store, hook_point: str, plan: ShufflePlan, shards: list[MixedShard]) -> MultisetHash:
    """Return the hash of all rows of one shuffle as its first pass read them."""
    if plan.sizes.passes == 1:
        return _merge_facts(store, [(shards[0].ref.path, shards[0].manifest)], "source_multiset_hash")
    refs = list_splits(pipeline, hook_point, plan.sizes, 1, 0)
    manifests = load_manifests(store, refs, f"the certificate of {hook_point}", "pass 1 of the shuffle")
    return _merge_facts(store, [(ref.path, manifest) for ref, manifest in zip(refs, manifests, strict=True)], "multiset_hash")


def load_layout(pipeline: Pipeline, store: Store, plan: ShufflePlan) -> SourceLayout:
    """Read where the documents of the training shards start."""
    starts = [
        load_documents(pipeline, store, shard.shard_index).first_rows.astype(np.uint64) + np.uint64(shard.shard_index << SHARD_SHIFT)
        for shard in plan.shards
    ]
    indices = np.array([shard.shard_index for shard in plan.shards], np.int64)
    return SourceLayout(indices, np.array(plan.sizes.shard_rows, np.int64), np.concatenate(starts))


def make_content(plan: ShufflePlan, mixing: Mixing, before: MultisetHash, after: MultisetHash) -> dict[str, Any]:
    """Return the certificate as plain data. Numbers are rounded to 6 digits, so that the last bits of a library do not matter."""
    is_judged = plan.sizes.n_rows >= MIN_ROWS
    findings = [_as_content(item) for item in mixing.findings]
    failed = [item["name"] for item in findings if is_judged and item["p"] < P_FAIL]
    return {
        "format": FORMAT,
        "version": VERSION,
        "passed": before == after and not failed,
        "failed": failed,
        "is_order_judged": is_judged,
        "n_rows": plan.sizes.n_rows,
        "multiset_hash_before": before.encode(),
        "multiset_hash_after": after.encode(),
        "p_fail": P_FAIL,
        "lowest_p": min((item["p"] for item in findings), default=1.0),
        "findings": findings,
        "lags": [_as_content(item) for item in mixing.lags],
    }


def _as_content(item: Finding | LagFinding) -> dict[str, Any]:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in item._asdict().items()}


def _merge_facts(store: Store, found: list[tuple[str, Manifest]], fact: str) -> MultisetHash:
    total = MultisetHash()
    for path, manifest in found:
        try:
            total = total.merge(MultisetHash.decode(manifest.facts[fact]))
        except (KeyError, ValueError) as error:
            raise ArtifactCorruptError(f"The manifest of {store.url}/{path} has no readable fact {fact!r}. Re-materialize this partition.") from error
    return total


def _describe_loss(
    store: Store, hook_point: str, plan: ShufflePlan, shards: list[MixedShard], mixing: Mixing, before: MultisetHash, after: MultisetHash
) -> str:
    """Say which shards lost or gained rows, and which rows are there twice."""
    wrong = [
        f"{shard_key(shard.shard_index)} ({shard.n_valid:,} in, {int(found):,} out)"
        for shard, found in zip(plan.shards, mixing.shard_rows, strict=True)
        if shard.n_valid != found
    ]
    ids, counts = np.unique(np.concatenate([read_mixed_ids(store, shard, 0, shard.n_rows) for shard in shards]), return_counts=True)
    doubled: NDArray[np.uint64] = ids[counts > 1]
    rows = ", ".join(f"{shard_key(int(row_id) >> SHARD_SHIFT)} row {int(row_id) & ((1 << SHARD_SHIFT) - 1):,}" for row_id in doubled[:5])
    return (
        f"The shuffle of {hook_point} in {store.url} did not keep its rows: {before.n_rows:,} went in, {after.n_rows:,} came out, and their multiset "
        f"hashes differ ({before.encode()} before, {after.encode()} after). Shards with wrong counts: {', '.join(wrong[:10]) or 'none'}; "
        f"rows that are there twice: {len(doubled):,}{f' ({rows})' if rows else ''}. Do not train on them. "
        "Run `interp verify` on 3-shuffle; if it finds nothing, please report this, and delete and materialize the passes again."
    )
