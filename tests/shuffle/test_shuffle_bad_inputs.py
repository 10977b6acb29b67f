"""Each bad input ends in a message that says what, where and what to do, and nothing is published."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from shuffle_world import HOOK, World, make_world, run_shuffle, run_splits, write_tokens

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ArtifactCorruptError, ArtifactMissingError, PlanError
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.mixed import make_mixed_shard, open_mixed, read_mixed_rows
from interp_assets.shuffle.plan import PLAN, decode_plan, load_shuffle_plan, make_shuffle_plan, row_format
from interp_assets.shuffle.refs import mixed_shard_ref, shuffle_plan_ref, split_shard_ref
from interp_assets.shuffle.sources import load_shards
from interp_assets.shuffle.split import draw_split, split_bucket, split_shard
from interp_assets.storage.manifest import create_artifact, find_manifest, load_manifest, remove_artifact
from interp_assets.storage.tensors import save_tensors


def planned(**options: int) -> World:
    """Return a world whose shuffle is planned."""
    world = make_world((40, 30), **options)  # type: ignore[arg-type] - the options are whole numbers
    make_shuffle_plan(world.pipeline, world.store)
    return world


def test_a_shard_with_fewer_rows_than_its_tokens_is_refused() -> None:
    """A shard cut short would shift every row id behind it."""
    pipeline, store, _ = planned()
    ref = activation_shard_ref(pipeline, HOOK, 1)
    with create_artifact(store, ref, replace=True) as art:
        save_tensors(art, "rows.safetensors", {"rows": torch.zeros(39, 4)}, n_rows=39)
    message = r"Activation shard 1 of resid_post.0 has 39 rows of \(4,\) x float32; its token shard .* say 40 .*Re-materialize this partition"
    with pytest.raises(ArtifactCorruptError, match=message):
        split_shard(pipeline, store, HOOK, 1)
    assert find_manifest(store, split_shard_ref(pipeline, HOOK, 1)) is None


def test_a_shard_of_another_width_is_refused() -> None:
    """A hook point of another model must not be cut into rows of ours."""
    pipeline, store, _ = planned()
    with create_artifact(store, activation_shard_ref(pipeline, HOOK, 1), replace=True) as art:
        save_tensors(art, "rows.safetensors", {"rows": torch.zeros(40, 5)}, n_rows=40)
    with pytest.raises(ArtifactCorruptError, match=r"has 40 rows of \(5,\) x float32"):
        split_shard(pipeline, store, HOOK, 1)


def test_token_shards_that_changed_after_the_plan_are_noticed() -> None:
    """The plan fixes how many rows every job has; tokens rebuilt with other special tokens would overflow a bucket."""
    pipeline, store, _ = planned()
    write_tokens(pipeline, store, 1, np.arange(40) > 2)
    with pytest.raises(ArtifactCorruptError, match="shard-000001 has 40 rows, 37 of them valid; the shuffle plan says 40 and 40"):
        split_shard(pipeline, store, HOOK, 1)


def test_all_missing_job_files_are_named_at_once() -> None:
    """Nobody wants to find 400 lost workers one run at a time."""
    world = make_world((10,) * 5, fan_out=2)
    run_splits(world)
    pipeline, store, _ = world
    for index in (2, 4):
        remove_artifact(store, split_shard_ref(pipeline, HOOK, index).path)
    with pytest.raises(ArtifactMissingError, match=r"2 of 5 files that bucket-00001 of resid_post.0 needs") as caught:
        gather_bucket(pipeline, store, HOOK, 1)
    assert "shard-000002" in str(caught.value)
    assert "shard-000004" in str(caught.value)
    assert "Materialize these partitions of pass 1 of the shuffle" in str(caught.value)
    assert find_manifest(store, mixed_shard_ref(pipeline, HOOK, 1)) is None


def test_all_missing_activation_shards_are_named_at_once() -> None:
    """With one pass the gather reads them itself."""
    world = make_world((10,) * 4, passes=1)
    pipeline, store, _ = world
    make_shuffle_plan(pipeline, store)
    for index in (1, 3):
        remove_artifact(store, activation_shard_ref(pipeline, HOOK, index).path)
    with pytest.raises(ArtifactMissingError, match=r"2 of 4 files that the shuffle of resid_post.0 needs"):
        gather_bucket(pipeline, store, HOOK, 0)


def test_all_missing_token_shards_and_mixed_shards_are_named_at_once() -> None:
    """The same at both ends of the stage."""
    world = planned()
    pipeline, store, _ = world
    with pytest.raises(ArtifactMissingError, match=r"2 of 2 mixed shards of resid_post.0 cannot be read:\n  bucket-00000: .*\n  bucket-00001"):
        open_mixed(pipeline, store, HOOK)
    for index in (1, 2):
        remove_artifact(store, token_shard_ref(pipeline, index).path)
    with pytest.raises(ArtifactMissingError, match=r"row counts of 2 of 2 token shards cannot be read:\n  shard-000001"):
        make_shuffle_plan(pipeline, store)


@pytest.mark.parametrize("ranges", [[0, 20, 41], [0, 21, 20], [0, 40], [1, 20, 40], []])
def test_a_bucket_is_never_read_past_its_range(ranges: list[int]) -> None:
    """A manifest that lies about its ranges would hand rows of one bucket to another."""
    world = make_world((40, 30))
    run_splits(world)
    pipeline, store, _ = world
    ref = split_shard_ref(pipeline, HOOK, 1)
    data = store.get(f"{ref.path}/rows.bin")
    with create_artifact(store, ref, replace=True) as art:
        art.put("rows.bin", data, n_rows=40)
        art.facts |= {"ranges": ranges}
    with pytest.raises(ArtifactCorruptError, match="range 1 is missing, out of order or past the end"):
        gather_bucket(pipeline, store, HOOK, 1)


def test_ranges_that_do_not_fill_the_bucket_are_refused() -> None:
    """Two sound files of different plans do not make a bucket."""
    world = make_world((40, 30))
    run_splits(world)
    pipeline, store, _ = world
    ref = split_shard_ref(pipeline, HOOK, 1)
    data = store.get(f"{ref.path}/rows.bin")
    with create_artifact(store, ref, replace=True) as art:
        art.put("rows.bin", data, n_rows=40)
        art.facts |= {"ranges": [0, 1, 40]}
    with pytest.raises(ArtifactCorruptError, match=r"hold \d+ rows for bucket-00001 of resid_post.0; the plan says 35"):
        gather_bucket(pipeline, store, HOOK, 1)


def test_a_flipped_byte_in_a_job_file_is_found() -> None:
    """Ranged reads are verified."""
    world = make_world((40, 30))
    run_splits(world)
    path = f"{split_shard_ref(world.pipeline, HOOK, 2).path}/rows.bin"
    data = bytearray(world.store.get(path))
    data[100] ^= 1
    world.store.put(path, bytes(data))
    with pytest.raises(ArtifactCorruptError, match=r"rows.bin is damaged in block 0"):
        gather_bucket(world.pipeline, world.store, HOOK, 0)
    assert find_manifest(world.store, mixed_shard_ref(world.pipeline, HOOK, 0)) is None


def test_a_plan_that_cannot_fit_names_every_knob_and_values_that_work() -> None:
    """Out of memory after six hours is the alternative."""
    world = make_world((40_000, 50_000), passes=2, fan_out=2, d_in=16, memory_bytes=1 << 20)
    with pytest.raises(PlanError) as caught:
        make_shuffle_plan(world.pipeline, world.store)
    message = str(caught.value)
    assert "shuffle.memory_bytes = 1,048,576 (104 bytes a row" in message
    assert "a mixed shard of 45,000 rows needs 4,680,000 bytes: raise shuffle.fan_out from 2 to 9" in message
    assert "a training shard of 50,000 rows needs 5,200,000 bytes: cut the corpus finer (`corpus.shard_bytes`, about 52,858)" in message
    assert "set shuffle.memory_bytes to 5,200,000 or more" in message
    assert find_manifest(world.store, shuffle_plan_ref(world.pipeline)) is None
    make_shuffle_plan(*make_world((40_000, 50_000), passes=2, fan_out=2, d_in=16, memory_bytes=5_200_000)[:2])
    make_shuffle_plan(*make_world((9000,) * 10, passes=2, fan_out=9, d_in=16, memory_bytes=1 << 20)[:2])


def test_one_pass_that_cannot_fit_asks_for_two() -> None:
    """The way out of a full memory is another pass."""
    world = make_world((9000,) * 10, passes=1, d_in=16, memory_bytes=1 << 20)
    with pytest.raises(PlanError, match=r"set shuffle.passes to 2 and shuffle.fan_out to 9"):
        make_shuffle_plan(world.pipeline, world.store)


def test_no_rows_at_all_is_said_before_any_work() -> None:
    """A corpus of one shard has only a held-out one."""
    world = make_world(())
    with pytest.raises(PlanError, match=r"has no row to shuffle: 0 training shards besides 1 held-out"):
        make_shuffle_plan(world.pipeline, world.store)


def test_shards_buckets_and_passes_that_do_not_exist_are_named() -> None:
    """Partition keys are typed by people."""
    pipeline, store, _ = planned(passes=3)
    with pytest.raises(PlanError, match=r"shard-000000 is not in the shuffle plan, which has 2 training shards \(shard-000001 to shard-000002\)"):
        split_shard(pipeline, store, HOOK, 0)
    with pytest.raises(PlanError, match=r"There is no bucket-00004: .* has 4 mixed shards"):
        gather_bucket(pipeline, store, HOOK, 4)
    with pytest.raises(PlanError, match="Pass 3 splits no buckets"):
        split_bucket(pipeline, store, HOOK, 3, 0)
    single, other, _ = planned(passes=1)
    with pytest.raises(PlanError, match="A shuffle of one pass splits nothing"):
        split_shard(single, other, HOOK, 1)


def test_a_machine_that_draws_other_counts_is_noticed() -> None:
    """Jobs agree without talking only while all draw alike; a wrong one must not publish."""
    world = planned()
    plan = load_shuffle_plan(world.pipeline, world.store)
    tables = plan.counts[0]
    assert tables is not None
    other = dataclasses.replace(plan, counts=[[tables[0][::-1].copy()]])
    with pytest.raises(ArtifactCorruptError, match="This machine draws other counts for job 0 of pass 1 than the shuffle plan in memory"):
        draw_split(other, 1, 0, 0, world.store.url)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": "other"}'])
def test_a_damaged_plan_is_refused(data: bytes) -> None:
    """The plan is read by every job."""
    with pytest.raises(ArtifactCorruptError, match=r"here is not a shuffle plan .*Materialize `shuffle_plan` again"):
        decode_plan(data, "here")


def test_a_plan_of_another_version_is_refused() -> None:
    """Formats change; a reader must say so."""
    world = planned()
    ref = shuffle_plan_ref(world.pipeline)
    data = world.store.get(f"{ref.path}/{PLAN}").replace(b'"version": 1', b'"version": 9')
    with pytest.raises(ArtifactCorruptError, match=r"here is \('interp-assets/shuffle_plan', 9\), this release reads"):
        decode_plan(data, "here")


def test_two_runs_that_write_one_shard_publish_one_artifact() -> None:
    """A duplicate attempt writes the same bytes, so either may win."""
    world = planned()
    pipeline, store, _ = world
    errors: list[Exception] = []

    def work() -> None:
        try:
            split_shard(pipeline, store, HOOK, 1)
        except ArtifactMissingError as error:  # the other attempt removed what it took for an old one
            errors.append(error)

    runs = [threading.Thread(target=work) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    split_shard(pipeline, store, HOOK, 1)
    assert load_manifest(store, split_shard_ref(pipeline, HOOK, 1)).facts["n_rows"] == 40
    shards = load_shuffle_plan(pipeline, store).shards
    buffer = np.empty(sum(shard.n_rows for shard in shards) * row_format(pipeline, HOOK).row_bytes, np.uint8)
    raw = load_shards(pipeline, store, HOOK, shards, buffer)
    assert raw.n_rows == 70


def test_a_mixed_shard_whose_facts_and_file_disagree_is_refused() -> None:
    """Where a tensor lies is computed from the facts."""
    world = make_world((40, 30))
    run_shuffle(world)
    pipeline, store, _ = world
    shard = open_mixed(pipeline, store, HOOK)[0]
    wrong = dataclasses.replace(shard.manifest, facts={**shard.manifest.facts, "n_rows": 34})
    with pytest.raises(ArtifactCorruptError, match=r"rows.safetensors has 4,936 bytes by its manifest; 34 rows of 4 x float32 need 4,912"):
        make_mixed_shard(store, 0, shard.ref, wrong)
    with pytest.raises(ArtifactCorruptError, match="lacks the fact 'n_rows'"):
        make_mixed_shard(store, 0, shard.ref, dataclasses.replace(shard.manifest, facts={}))
    with pytest.raises(ArtifactCorruptError, match="has 35 rows; rows 30 to 36 were asked for"):
        read_mixed_rows(store, shard, 30, 36)
