"""The mixed shards of a pipeline that has grown: the newest generation is shuffled alone and merged in, and the result is certified as a whole.

One bucket at a time, as any shuffle (`mix_bucket`). The mixed shards of the newest generation are small beside the old ones, and each merged
shard may need any of them, so the first bucket makes them all and the others find them. Two jobs that do so at once make equal bytes.
The certificate covers all rows: their multiset hash is that of the generations' activation rows together, and the battery of `mixing.py`
looks at the merged order, which must be as uniform as that of a shuffle from scratch.
"""

from interp_assets.planning.pipeline import Pipeline
from interp_assets.shuffle.append import Appending, append_bucket
from interp_assets.shuffle.certificate import certify, certify_against, hash_before
from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.generations import before, has_grown, newest
from interp_assets.shuffle.mixed import MixedShard, open_mixed
from interp_assets.shuffle.multiset import MultisetHash
from interp_assets.shuffle.plan import ShufflePlan, load_shard_rows, load_shuffle_plan, make_sizes
from interp_assets.shuffle.refs import certificate_ref, n_mixed_shards
from interp_assets.shuffle.rows import Progress
from interp_assets.storage.manifest import Produced, load_manifest
from interp_assets.storage.store import Store


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

    def find_sources(_shards: list[MixedShard]) -> tuple[ShufflePlan, MultisetHash]:
        rows = load_shard_rows(pipeline, store)
        plan = ShufflePlan(seed=pipeline.config.seed, shards=rows, sizes=make_sizes(pipeline, rows), counts=[])
        return plan, _hash_sources(pipeline, store, hook_point)

    return certify_against(pipeline, store, hook_point, find_sources, progress)


def _hash_sources(pipeline: Pipeline, store: Store, hook_point: str) -> MultisetHash:
    """Hash the rows that went in: those that the certificate before counted, and the newest generation's as its first pass read them."""
    own = newest(pipeline)
    known = load_manifest(store, certificate_ref(before(pipeline), hook_point)).facts["multiset_hash_before"]
    return MultisetHash.decode(known).merge(hash_before(own, store, hook_point, load_shuffle_plan(own, store), open_mixed(own, store, hook_point)))
