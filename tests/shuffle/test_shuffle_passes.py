"""Bytes follow the pure order, in any number of passes: nothing is lost, jobs are deterministic, and memory stays in its bound."""

import gc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shuffle_orders import shuffle_indices
from shuffle_world import HOOK, make_world, run_shuffle, run_splits

from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.mixed import open_mixed, read_mixed_ids, read_mixed_rows
from interp_assets.shuffle.permutation import Draws, split_job
from interp_assets.shuffle.plan import job_bytes, load_shuffle_plan, make_shuffle_plan, row_format
from interp_assets.shuffle.refs import mixed_shard_ref, split_shard_ref
from interp_assets.shuffle.rows import FIXED_BYTES, Segment, cut_segment
from interp_assets.shuffle.sizes import ShuffleSizes, offsets, shares
from interp_assets.shuffle.sources import list_splits, load_manifests
from interp_assets.shuffle.split import block_bytes, split_bucket, split_shard
from interp_assets.storage.manifest import create_artifact, file_part, load_manifest, remove_artifact
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import save_tensors


@pytest.mark.parametrize(
    ("passes", "fan_out", "shard_rows"),
    [(1, 3, (50, 30, 7)), (2, 2, (50, 30, 7)), (2, 5, (1, 3, 0, 40)), (3, 3, (50, 30, 7)), (4, 2, (50, 0, 7))],
)
def test_the_bytes_follow_the_pure_order(passes: int, fan_out: int, shard_rows: tuple[int, ...]) -> None:
    """The proofs run on row numbers; this is what makes them proofs about files. Every row keeps its content and its id."""
    world = make_world(shard_rows, passes=passes, fan_out=fan_out, invalid_every=7, seed=5)
    found = run_shuffle(world)
    sizes = load_shuffle_plan(world.pipeline, world.store).sizes
    assert [len(ids) for ids in found] == [sizes.input_rows(passes, bucket) for bucket in range(sizes.n_buckets)]
    for ids, order in zip(found, shuffle_indices(sizes, Draws(5)), strict=True):
        assert ids.tolist() == world.row_ids[order].tolist()


@given(
    shard_rows=st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any),
    passes=st.integers(1, 4),
    fan_out=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_no_row_is_lost_or_doubled_for_any_sizes(shard_rows: list[int], passes: int, fan_out: int, seed: int) -> None:
    """A bijection for all shards, passes and fan-outs, into buckets that differ by at most one row a pass."""
    sizes = ShuffleSizes(passes=passes, fan_out=fan_out, shard_rows=tuple(shard_rows))
    buckets = shuffle_indices(sizes, Draws(seed))
    assert sorted(np.concatenate(buckets).tolist()) == list(range(sum(shard_rows)))
    lengths = [len(rows) for rows in buckets]
    assert len(lengths) == sizes.n_buckets == fan_out ** (passes - 1)
    assert max(lengths) - min(lengths) <= max(0, passes - 1)
    assert max(lengths) == sizes.largest_bucket_rows


@given(
    shard_rows=st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any),
    passes=st.integers(2, 4),
    fan_out=st.integers(1, 5),
)
@settings(deadline=None, max_examples=30)
def test_the_jobs_of_a_bucket_add_up_and_none_is_larger_than_a_shard(shard_rows: list[int], passes: int, fan_out: int) -> None:
    """What fits pass 1 fits every pass; and the counts of the jobs fill each output bucket exactly."""
    sizes = ShuffleSizes(passes=passes, fan_out=fan_out, shard_rows=tuple(shard_rows))
    for pass_index in range(1, passes):
        for bucket in range(sizes.n_inputs(pass_index)):
            jobs = sizes.job_rows(pass_index, bucket)
            assert sum(jobs) == sizes.input_rows(pass_index, bucket)
            assert max(jobs) <= max(shard_rows)
            splits = [split_job(Draws(1), sizes, pass_index, bucket, job) for job in range(len(jobs))]
            filled = np.sum([np.diff(split.offsets) for split in splits], axis=0)
            assert filled.tolist() == sizes.capacities(pass_index, bucket)


def test_several_hook_points_get_one_order() -> None:
    """Transcoders and crosscoders read the same token at several places: row i must be one token everywhere."""
    world = make_world((40, 30), passes=3, fan_out=2, hooks=("resid_post.0", "mlp_out.1"), invalid_every=9)
    first, second = run_shuffle(world, "resid_post.0"), run_shuffle(world, "mlp_out.1")
    assert np.concatenate(first).tolist() == np.concatenate(second).tolist()


def test_another_seed_gives_another_order_and_the_same_seed_the_same_bytes() -> None:
    """Same inputs, same bytes: a lost shard made again leaves everything after it fresh."""
    digests = []
    for seed, url in ((3, "memory://a"), (3, "memory://b"), (4, "memory://c")):
        world = make_world((40, 30), passes=3, fan_out=2, seed=seed, store=open_store(url))
        run_shuffle(world)
        digests.append([shard.manifest.digest for shard in open_mixed(world.pipeline, world.store, HOOK)])
    assert digests[0] == digests[1]
    assert set(digests[0]).isdisjoint(digests[2])


def test_jobs_run_in_any_order_and_finished_work_is_skipped() -> None:
    """A job needs nobody's state: the last shard may be split first, and twice."""
    world = make_world((40, 30, 20), passes=2, fan_out=3)
    pipeline, store, _ = world
    make_shuffle_plan(pipeline, store)
    forward = {index: split_shard(pipeline, store, HOOK, index).manifest.digest for index in (1, 2, 3)}
    for index in (3, 1, 2):
        again = split_shard(pipeline, store, HOOK, index)
        assert again.is_cached
        store.delete([f"{again.ref.path}/manifest.json"])
        rebuilt = split_shard(pipeline, store, HOOK, index)
        assert not rebuilt.is_cached
        assert rebuilt.manifest.digest == forward[index]
    assert make_shuffle_plan(pipeline, store).is_cached
    assert not gather_bucket(pipeline, store, HOOK, 2).is_cached
    assert gather_bucket(pipeline, store, HOOK, 2).is_cached


def test_progress_counts_every_row_of_every_job() -> None:
    """Bars that end at 97 % make people wait."""
    world = make_world((40, 30), passes=3, fan_out=2)
    pipeline, store, _ = world
    done: list[int] = []
    make_shuffle_plan(pipeline, store)
    for index in (1, 2):
        split_shard(pipeline, store, HOOK, index, done.append)
    assert sum(done) == 70
    for bucket in range(2):
        split_bucket(pipeline, store, HOOK, 2, bucket, done.append)
    for bucket in range(4):
        gather_bucket(pipeline, store, HOOK, bucket, done.append)
    assert sum(done) == 210


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_of_any_type_and_odd_width_arrive_on_a_disk(local_store: Store, dtype: str) -> None:
    """Rows move as bytes; a width that is no multiple of a word must not matter."""
    world = make_world((64, 33), passes=2, fan_out=2, d_in=5, dtype=dtype, store=local_store)
    assert sorted(np.concatenate(run_shuffle(world)).tolist()) == world.row_ids.tolist()


def test_any_range_of_a_mixed_shard_can_be_read() -> None:
    """A trainer reads batches, not shards."""
    world = make_world((40, 30), passes=2, fan_out=2)
    run_shuffle(world)
    shard = open_mixed(world.pipeline, world.store, HOOK)[1]
    whole, part = read_mixed_rows(world.store, shard, 0, shard.n_rows), read_mixed_rows(world.store, shard, 7, 19)
    assert part.rows.tolist() == whole.rows[7:19].tolist()
    assert part.row_ids.tolist() == whole.row_ids[7:19].tolist() == read_mixed_ids(world.store, shard, 7, 19).tolist()
    assert (shard.n_rows, shard.d_in, shard.dtype) == (35, 4, "float32")


def test_rows_that_were_made_again_with_other_bytes_are_shuffled_again() -> None:
    """An id promises equal bytes on one kind of device only; mixing old and new rows would be worse than either."""
    world = make_world((60, 50), passes=3, fan_out=2)
    before = [np.concatenate(run_shuffle(world))]
    pipeline, store, _ = world
    assert all(gather_bucket(pipeline, store, HOOK, bucket).is_cached for bucket in range(4))
    ref = activation_shard_ref(pipeline, HOOK, 2)
    with create_artifact(store, ref, replace=True) as art:
        save_tensors(art, "rows.safetensors", {"rows": torch.full((50, 4), 7.0)}, n_rows=50)
    assert split_shard(pipeline, store, HOOK, 1).is_cached
    assert not split_shard(pipeline, store, HOOK, 2).is_cached
    assert not any(produced.is_cached for bucket in range(2) for produced in split_bucket(pipeline, store, HOOK, 2, bucket))
    assert not any(gather_bucket(pipeline, store, HOOK, bucket).is_cached for bucket in range(4))
    shards = open_mixed(pipeline, store, HOOK)
    rows, ids = zip(*(read_mixed_rows(store, shard, 0, shard.n_rows) for shard in shards), strict=True)
    is_new = np.concatenate([part.numpy() for part in ids]) >> np.uint64(40) == 2
    assert np.array_equal((torch.cat(rows) == 7.0).all(dim=1).numpy(), is_new)
    assert np.concatenate([part.numpy() for part in ids]).tolist() == before[0].tolist(), "the order depends on the plan alone"


def test_mixed_shards_outlive_the_files_they_were_made_from() -> None:
    """Split files are twice the data; whoever deletes them must not be made to shuffle again."""
    world = make_world((60, 50), passes=2, fan_out=2)
    run_shuffle(world)
    pipeline, store, _ = world
    for index in pipeline.train_indices:
        remove_artifact(store, split_shard_ref(pipeline, HOOK, index).path)
    assert all(gather_bucket(pipeline, store, HOOK, bucket).is_cached for bucket in range(2))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize("passes", [1, 2])
def test_memory_stays_within_the_bound(local_store: Store, passes: int) -> None:
    """`shuffle.memory_bytes` is a promise: rows with their ids are held once, an order needs `SORT_BYTES` a row, the rest is fixed."""
    n_rows = 800_000
    pipeline = make_world((n_rows,) * passes, passes=passes, fan_out=passes, d_in=128, dtype="bfloat16", store=local_store, invalid_every=50).pipeline
    bound = job_bytes(n_rows, row_format(pipeline, HOOK)) + FIXED_BYTES
    make_shuffle_plan(pipeline, local_store)
    if passes == 2:
        split_shard(pipeline, local_store, HOOK, 2)
        assert resident_peak(lambda: split_shard(pipeline, local_store, HOOK, 1)) < bound
    used = resident_peak(lambda: gather_bucket(pipeline, local_store, HOOK, 0))
    assert n_rows * 256 < used < bound, "the rows themselves must be seen, or this measures nothing"


def resident_peak(work: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory of this process rises at most while `work` runs, buffers outside Python's heap included."""
    gc.collect()
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return read_status("VmHWM") - before


def read_status(field: str) -> int:
    """Return a size of this process as the kernel counts it, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def test_reads_end_where_checksum_blocks_end() -> None:
    """A verified read costs whole blocks: pieces cut elsewhere would read every border block twice."""
    world = make_world((20_000, 20_000), passes=2, fan_out=2, d_in=64)
    run_splits(world)
    refs = list_splits(world.pipeline, HOOK, load_shuffle_plan(world.pipeline, world.store).sizes, 1, 0)
    manifest = load_manifests(world.store, refs, "a test", "a test")[0]
    entry = manifest.file("rows.bin")
    cuts = list(cut_segment(Segment(file_part("path", entry, 1000, entry.n_bytes - 1000), 500)))
    pieces = [cut.part for cut in cuts]
    assert sum(piece.n_bytes for piece in pieces) == entry.n_bytes - 1000
    assert [cut.at for cut in cuts] == [500 + piece.start - 1000 for piece in pieces]
    assert all(piece.start % entry.block_bytes == 0 for piece in pieces[1:])
    assert all(a.start + a.n_bytes == b.start for a, b in pairwise(pieces))


def test_a_block_costs_about_as_much_as_the_manifest_that_lists_it() -> None:
    """Whoever reads a range reads one block too much and the file's manifest: neither may outgrow the other, or the range."""
    assert {n: block_bytes(n) for n in (1 << 20, 1 << 29, 100 << 30, 1 << 50)} == {
        1 << 20: 64 << 10,
        1 << 29: 128 << 10,
        100 << 30: 2 << 20,
        1 << 50: 4 << 20,
    }
    for file_bytes in (1 << 29, 1 << 34, 100 << 30):
        n_block, n_manifest = block_bytes(file_bytes), 36 * file_bytes / block_bytes(file_bytes)
        assert n_block / 2.1 < n_manifest < n_block * 2.1


def test_shares_and_offsets_are_plain_arithmetic() -> None:
    """Sizes are the contract between all jobs."""
    assert shares(10, 4) == [2, 3, 2, 3]
    assert offsets([2, 0, 3]) == [0, 2, 2, 5]


def test_a_mixed_shard_says_what_it_holds() -> None:
    """Later stages read facts, not files."""
    world = make_world((40, 30), passes=1)
    run_shuffle(world)
    facts = load_manifest(world.store, mixed_shard_ref(world.pipeline, HOOK, 0)).facts
    assert (facts["n_rows"], facts["d_in"], facts["dtype"]) == (70, 4, "float32")
    assert facts["multiset_hash"] == facts["source_multiset_hash"]
