"""The mixed shards of a pipeline that has grown: the newest generation is shuffled alone and merged in, and the result is certified as a whole.

One bucket at a time, as any shuffle (`mix_bucket`). The mixed shards of the newest generation are small beside the old ones, and each merged
shard may need any of them, so the first bucket makes them all and the others find them. Two jobs that do so at once make equal bytes.
The certificate covers all rows: their multiset hash is that of the generations' activation rows together, and the battery of `mixing.py`
looks at the merged order, which must be as uniform as that of a shuffle from scratch.
"""

import time

from interp_assets.manifest import Produced, create_artifact, find_made_from, load_manifest
from interp_assets.pipeline import Pipeline
from interp_assets.shuffle.append import Appending, append_bucket
from interp_assets.shuffle.certificate import CERTIFICATE, certify, encode_certificate, hash_after, hash_before, load_layout, make_content
from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.generations import before, has_grown, newest
from interp_assets.shuffle.mixed import open_mixed, read_mixed_ids
from interp_assets.shuffle.mixing import MixingMeter
from interp_assets.shuffle.multiset import MultisetHash
from interp_assets.shuffle.plan import ShufflePlan, load_shard_rows, load_shuffle_plan, make_sizes
from interp_assets.shuffle.refs import certificate_ref, n_mixed_shards
from interp_assets.shuffle.rows import Progress
from interp_assets.store import Store


def mix_bucket(pipeline: Pipeline, store: Store, hook_point: str, bucket: int, progress: Progress | None = None) -> Produced:
    """Make mixed shard `bucket` of a pipeline, grown or not."""
    if not has_grown(pipeline):
        return gather_bucket(pipeline, store, hook_point, bucket, progress)
    for own in range(n_mixed_shards(pipeline)):
        gather_bucket(newest(pipeline), store, hook_point, own, None)
    sources = Appending(open_mixed(before(pipeline), store, hook_point), open_mixed(newest(pipeline), store, hook_point), n_mixed_shards(pipeline))
    return append_bucket(pipeline, store, hook_point, sources, bucket, progress)


def certify_mixed(pipeline: Pipeline, store: Store, hook_point: str, progress: Progress | None = None) -> Produced:
    """Certify the mixed shards of a pipeline, grown or not. Raises like `certify`."""
    if not has_grown(pipeline):
        return certify(pipeline, store, hook_point, progress)
    started, ref = time.monotonic(), certificate_ref(pipeline, hook_point)
    shards = open_mixed(pipeline, store, hook_point)
    mixed = [shard.manifest for shard in shards]
    manifest = find_made_from(store, ref, mixed)
    if manifest is not None:
        return Produced(ref, manifest, is_cached=True, wall_s=time.monotonic() - started)
    rows = load_shard_rows(pipeline, store)
    plan = ShufflePlan(seed=pipeline.config.seed, shards=rows, sizes=make_sizes(pipeline, rows), counts=[])
    meter = MixingMeter(load_layout(pipeline, store, plan), [shard.n_rows for shard in shards])
    for shard in shards:
        meter.add(read_mixed_ids(store, shard, 0, shard.n_rows))
        if progress is not None:
            progress(shard.n_rows)
    content = make_content(plan, meter.findings(), _hash_sources(pipeline, store, hook_point), hash_after(store, shards))
    with create_artifact(store, ref, made_from=mixed) as art:
        art.put(CERTIFICATE, encode_certificate(content))
        art.facts |= {key: value for key, value in content.items() if key not in ("format", "version", "findings", "lags")}
        art.facts["p_values"] = {item["name"]: item["p"] for item in content["findings"]}
    assert art.manifest is not None
    return Produced(ref, art.manifest, is_cached=False, wall_s=time.monotonic() - started)


def _hash_sources(pipeline: Pipeline, store: Store, hook_point: str) -> MultisetHash:
    """Hash the rows that went in: those that the certificate before counted, and the newest generation's as its first pass read them."""
    own = newest(pipeline)
    known = load_manifest(store, certificate_ref(before(pipeline), hook_point)).facts["multiset_hash_before"]
    return MultisetHash.decode(known).merge(hash_before(own, store, hook_point, load_shuffle_plan(own, store), open_mixed(own, store, hook_point)))
