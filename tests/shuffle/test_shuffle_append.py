"""Appending is exact: old and new rows come out as one uniform permutation, and each is read and written once."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from shuffle_orders import append_indices, shuffle_indices
from shuffle_world import HOOK, World, make_world, row_values, run_shuffle

from interp_assets.compute.seeds import Stream
from interp_assets.errors import PlanError
from interp_assets.shuffle.append import (
    Appending,
    append_bucket,
    merge_words,
)
from interp_assets.shuffle.generations import make_own
from interp_assets.shuffle.mixed import MixedShard, make_mixed_shard, open_mixed, read_mixed_rows
from interp_assets.shuffle.permutation import Draws
from interp_assets.shuffle.plan import load_shuffle_plan
from interp_assets.shuffle.sizes import ShuffleSizes
from interp_assets.storage.store import Store

OLD, NEW = ShuffleSizes(passes=2, fan_out=2, shard_rows=(2, 1)), ShuffleSizes(passes=1, fan_out=2, shard_rows=(1, 1))


def generation_seed(seed: int) -> int:
    """Return the seed of the new rows' own shuffle, as `newest` draws it."""
    return Draws(seed).stream("generation", 3, 4).torch_seed()


def appended(seed: int, n_buckets: int = 2, word_rows: int = 2, new_seed: Callable[[int], int] = generation_seed) -> tuple[int, ...]:
    """Shuffle three rows and two rows apart, and append the two."""
    old, new = np.concatenate(shuffle_indices(OLD, Draws(seed))), np.concatenate(shuffle_indices(NEW, Draws(new_seed(seed))))
    return tuple(append_indices(Draws(seed), old, new + 3, n_buckets, word_rows).tolist())


def uniformity_p(shuffle: Callable[[int], tuple[int, ...]], n_seeds: int = 960) -> float:
    """Return the chi-square p-value over all 120 orders of five rows."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(n_seeds):
        order = shuffle(seed)
        counts[order] = counts.get(order, 0) + 1
    expected = n_seeds / 120
    value = sum((count - expected) ** 2 for count in counts.values()) / expected + (120 - len(counts)) * expected
    return float(stats.chi2.sf(value, 119))


@pytest.mark.parametrize(("n_buckets", "word_rows"), [(2, 2), (3, 1)])
def test_every_order_of_old_and_new_rows_is_equally_likely(n_buckets: int, word_rows: int) -> None:
    """All 120 orders of three old and two new rows, for words and shards of any size."""
    assert uniformity_p(lambda seed: appended(seed, n_buckets, word_rows)) > 1e-4


def round_robin(_bits: Stream, n_old: int, n_new: int) -> Iterator[NDArray[np.bool_]]:
    """Take old and new rows in turn."""
    word = [True, False] * min(n_old, n_new) + [n_old > n_new] * abs(n_old - n_new)
    yield np.array(word, bool)


def fair_coin(bits: Stream, n_old: int, n_new: int) -> Iterator[NDArray[np.bool_]]:
    """Pick a source by a fair coin while both have rows: the merge that looks right."""
    word = []
    while n_old + n_new:
        is_old = n_new == 0 or (n_old > 0 and bits.below(2) == 0)
        word.append(is_old)
        n_old, n_new = n_old - is_old, n_new - (not is_old)
    yield np.array(word, bool)


def word_p(words: Callable[..., Iterator[NDArray[np.bool_]]], *options: int) -> float:
    """Return the chi-square p-value over the ten ways to interleave three old and two new rows."""
    counts: dict[tuple[bool, ...], int] = {}
    for seed in range(2000):
        word = tuple(np.concatenate(list(words(Draws(seed).stream("append", 3, 2, "words", 0), 3, 2, *options))).tolist())
        counts[word] = counts.get(word, 0) + 1
    value = sum((count - 200) ** 2 for count in counts.values()) / 200 + (10 - len(counts)) * 200
    return float(stats.chi2.sf(value, 9))


@pytest.mark.parametrize("words", [round_robin, fair_coin])
def test_a_merge_that_is_not_uniform_is_caught(words: Callable[..., Iterator[NDArray[np.bool_]]]) -> None:
    """Both are in use; neither is exact. Ours is, in words of any length."""
    assert word_p(words) < 1e-20
    assert word_p(merge_words, 2) > 1e-4


def test_one_seed_for_both_generations_is_caught() -> None:
    """The new rows' shuffle must not repeat the old one's streams: with one row a bucket both would be drawn alike."""
    same = ShuffleSizes(passes=1, fan_out=1, shard_rows=(3,))

    def shuffle(seed: int, new_seed: int) -> tuple[int, ...]:
        old, new = shuffle_indices(same, Draws(seed))[0], shuffle_indices(same, Draws(new_seed))[0] + 3
        return tuple(append_indices(Draws(seed), old, new, 1, 6).tolist())

    def relation(order: tuple[int, ...]) -> bool:
        return [row for row in order if row < 3] == [row - 3 for row in order if row >= 3]

    assert all(relation(shuffle(seed, seed)) for seed in range(50))
    assert sum(relation(shuffle(seed, generation_seed(seed))) for seed in range(300)) < 90  # one sixth is expected: 50


def grown(n_shards: int, store: Store | None = None, hooks: tuple[str, ...] = (HOOK,)) -> World:
    """Return the same world with its first shards only."""
    return make_world((40, 30, 25, 50)[:n_shards], passes=2, fan_out=2, invalid_every=7, hooks=hooks, store=store)


def append_all(world: World, before: World, old: list[MixedShard], hook: str = HOOK, n_buckets: int = 3) -> tuple[Appending, list[MixedShard]]:
    """Shuffle the new shards of a grown world, append them, and open the result."""
    added = [index for index in world.pipeline.train_indices if index not in before.pipeline.train_indices]
    generation = make_own(world.pipeline, added)
    new_world = World(generation, world.store, [])
    run_shuffle(new_world, hook)
    sources = Appending(old, open_mixed(generation, world.store, hook), n_buckets)
    made = [append_bucket(world.pipeline, world.store, hook, sources, bucket) for bucket in reversed(range(n_buckets))]
    return sources, [make_mixed_shard(world.store, bucket, item.ref, item.manifest) for bucket, item in enumerate(reversed(made))]


def read_ids(store: Store, shards: list[MixedShard], hook: str = HOOK) -> NDArray[np.uint64]:
    """Read the ids of all rows in order, and check that each row kept its content."""
    ids = []
    for shard in shards:
        rows, row_ids = read_mixed_rows(store, shard, 0, shard.n_rows)
        assert np.array_equal(rows.float().numpy(), row_values(hook, row_ids.numpy(), shard.d_in))
        ids.append(row_ids.numpy())
    return np.concatenate(ids)


def test_the_bytes_follow_the_pure_order_and_every_row_is_there_once(memory_store: Store) -> None:
    """The proof above is about files too; shards land twice here, the second time on an appended set."""
    before, world, later = grown(2, memory_store), grown(3, memory_store), grown(4, memory_store)
    run_shuffle(before)
    old = open_mixed(before.pipeline, memory_store, HOOK)
    sources, merged = append_all(world, before, old)
    assert [shard.n_rows for shard in merged] == [26, 27, 27]
    assert sorted(read_ids(memory_store, merged).tolist()) == world.row_ids.tolist()
    old_ids, new_ids = read_ids(memory_store, sources.old), read_ids(memory_store, sources.new)
    order = append_indices(Draws(0), np.arange(len(old_ids)), np.arange(len(new_ids)) + len(old_ids), 3)
    assert read_ids(memory_store, merged).tolist() == np.concatenate([old_ids, new_ids])[order].tolist()
    _, again = append_all(later, world, merged, n_buckets=2)
    assert sorted(read_ids(memory_store, again).tolist()) == later.row_ids.tolist()
    assert append_bucket(world.pipeline, memory_store, HOOK, sources, 0).is_cached


def test_hook_points_stay_aligned_after_appending(memory_store: Store) -> None:
    """Crosscoders read several hook points of one row."""
    hooks = ("resid_post.0", "mlp_out.1")
    before, world = grown(2, memory_store, hooks), grown(3, memory_store, hooks)
    orders = []
    for hook in hooks:
        run_shuffle(before, hook)
        _, merged = append_all(world, before, open_mixed(before.pipeline, memory_store, hook), hook)
        orders.append(read_ids(memory_store, merged, hook).tolist())
    assert orders[0] == orders[1]


def test_rows_of_different_kinds_are_not_merged(memory_store: Store) -> None:
    """Half precision and single precision rows do not make one tensor."""
    before = grown(2, memory_store)
    run_shuffle(before)
    old = open_mixed(before.pipeline, memory_store, HOOK)
    other = [shard._replace(dtype="bfloat16") for shard in old]
    with pytest.raises(PlanError, match=r"Rows of 2 kinds cannot be merged at resid_post.0: \[\(4, 'bfloat16'\), \(4, 'float32'\)\]"):
        append_bucket(before.pipeline, memory_store, HOOK, Appending(old, other, 2), 0)


def test_rows_larger_than_a_read_are_joined_across_pieces(local_store: Store) -> None:
    """Rows lie across checksum blocks and reads; 12 MB of them."""
    before, world = (make_world((10_000, 5000)[:n], passes=1, d_in=200, store=local_store) for n in (1, 2))
    run_shuffle(before)
    _, merged = append_all(world, before, open_mixed(before.pipeline, local_store, HOOK), n_buckets=2)
    assert sorted(read_ids(local_store, merged).tolist()) == world.row_ids.tolist()
    assert load_shuffle_plan(before.pipeline, local_store).sizes.n_rows == 10_000
