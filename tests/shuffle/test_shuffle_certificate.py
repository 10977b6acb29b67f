"""The certificate believes a uniform shuffle, and refuses the planted faults that a single order can show."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from shuffle_mutants import (
    ConstantTable,
    EqualSplits,
    NoFinalPermutation,
    NoFirstPermutation,
    OneSeedForAllBuckets,
    OneSeedForAllJobs,
    buffered,
    shards_then_rows,
)
from shuffle_orders import shuffle_indices
from shuffle_world import HOOK, make_world, run_shuffle, run_splits

from interp_assets.compute.seeds import stream
from interp_assets.errors import ArtifactCorruptError, CertificateError
from interp_assets.shuffle.certificate import P_FAIL, certify
from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.mixed import open_mixed, read_mixed_rows, save_mixed
from interp_assets.shuffle.mixing import Mixing, MixingMeter, SourceLayout, expected_entropy
from interp_assets.shuffle.multiset import MultisetHash, hash_kept, hash_records
from interp_assets.shuffle.permutation import Draws
from interp_assets.shuffle.plan import load_shuffle_plan
from interp_assets.shuffle.rows import RowFormat
from interp_assets.shuffle.significance import chi_square_p, coincidence_p, expect_coincidences, normal_p, poisson_p, student_p
from interp_assets.shuffle.sizes import ShuffleSizes, shares
from interp_assets.storage.manifest import create_artifact, read_file

SHARD_ROWS = (1500, 1500, 1500, 700, 1800, 1500) * 4
DOCUMENT_ROWS = 37


def layout() -> SourceLayout:
    """Return where the documents of the shards of these tests start."""
    starts = [np.arange(0, n, DOCUMENT_ROWS).astype(np.uint64) + np.uint64(i << 40) for i, n in enumerate(SHARD_ROWS)]
    return SourceLayout(np.arange(len(SHARD_ROWS)), np.array(SHARD_ROWS), np.concatenate(starts))


def measure(order: list[NDArray[np.int64]]) -> Mixing:
    """Measure the mixing of buckets of row numbers."""
    ids = np.concatenate([np.arange(n).astype(np.uint64) + np.uint64(i << 40) for i, n in enumerate(SHARD_ROWS)])
    meter = MixingMeter(layout(), [len(rows) for rows in order])
    for rows in order:
        meter.add(ids[rows])
    return meter.findings()


def shuffled(seed: int, draws: type[Draws] = Draws, passes: int = 2, fan_out: int = 5) -> list[NDArray[np.int64]]:
    """Shuffle the rows of these tests."""
    return shuffle_indices(ShuffleSizes(passes=passes, fan_out=fan_out, shard_rows=SHARD_ROWS), draws(seed))


@pytest.mark.parametrize(("passes", "fan_out"), [(1, 1), (2, 5)])
def test_p_values_of_uniform_shuffles_are_uniform(passes: int, fan_out: int) -> None:
    """A wrong null distribution either cries wolf or sleeps: 40 honest shuffles, every finding's p-values."""
    found: dict[str, list[float]] = {}
    for seed in range(40):
        for finding in measure(shuffled(seed, passes=passes, fan_out=fan_out)).findings:
            found.setdefault(finding.name, []).append(finding.p)
    expected = {"destination_positions", "document_lags", "batch_pairs", "batch_entropy", "global_order", "bucket_order", "successors"}
    assert set(found) == expected | ({"destination_buckets", "bucket_coincidence", "job_coincidence"} if passes > 1 else set())
    for name, values in found.items():
        assert min(values) > 1e-5, name
        if name not in ("document_lags", "successors"):  # the smallest of several, and one-sided: conservative by construction
            assert stats.kstest(values, "uniform").pvalue > 1e-4, name


CAUGHT = [
    (EqualSplits, {"destination_buckets"}),
    (OneSeedForAllJobs, {"job_coincidence"}),
    (OneSeedForAllBuckets, {"bucket_coincidence"}),
    (NoFinalPermutation, {"document_lags", "batch_pairs", "batch_entropy", "bucket_order"}),
    (NoFirstPermutation, {"document_lags", "batch_pairs", "batch_entropy"}),
]


@pytest.mark.parametrize(("mutant", "names"), CAUGHT)
def test_a_planted_fault_is_refused_by_the_finding_that_is_for_it(mutant: type[Draws], names: set[str]) -> None:
    """One order is enough for these; each row of the table in `mixing.py` is tested here."""
    failed = {finding.name for finding in measure(shuffled(1, mutant)).findings if finding.p < P_FAIL}
    assert names <= failed


def test_a_constant_table_is_invisible_in_one_order() -> None:
    """The limit of any certificate, written down: a single order from one constant table is a perfectly likely one."""
    assert not [finding for finding in measure(shuffled(1, ConstantTable)).findings if finding.p < P_FAIL]


@pytest.mark.parametrize("n_buffer", [1000, sum(SHARD_ROWS) // 2])
def test_a_shuffle_buffer_is_refused(n_buffer: int) -> None:
    """The field's usual way leaves documents near their place, even with half of the data in memory."""
    order = np.array(buffered(0, sum(SHARD_ROWS), n_buffer))
    failed = {finding.name for finding in measure(np.split(order, np.cumsum(shares(len(order), 5))[:-1])).findings if finding.p < P_FAIL}
    assert {"destination_buckets", "destination_positions", "global_order"} <= failed


def test_shards_then_rows_is_refused() -> None:
    """Shuffled files of shuffled rows: a batch sees one file."""
    order = np.array(shards_then_rows(0, SHARD_ROWS))
    failed = {finding.name for finding in measure(np.split(order, np.cumsum(shares(len(order), 5))[:-1])).findings if finding.p < P_FAIL}
    assert {"destination_positions", "document_lags", "batch_pairs", "batch_entropy"} <= failed


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_real_shuffle_passes_and_says_why(passes: int) -> None:
    """The whole way through files: the verdict, the findings and the lags that the UI plots."""
    world = make_world((500, 300, 700), passes=passes, fan_out=3, invalid_every=7)
    run_shuffle(world)
    done = certify(world.pipeline, world.store, HOOK)
    facts = done.manifest.facts
    assert facts["passed"]
    assert facts["failed"] == []
    assert facts["n_rows"] == len(world.row_ids) == 1285
    assert facts["multiset_hash_before"] == facts["multiset_hash_after"]
    content = json.loads(read_file(world.store, done.ref.path, done.manifest, "certificate.json"))
    assert content["lags"][0]["lag"] == 1
    assert {"name", "found", "expected", "p"} == set(content["findings"][0])
    assert certify(world.pipeline, world.store, HOOK).is_cached


def test_the_hash_does_not_depend_on_passes_or_order() -> None:
    """It is a hash of a multiset; any way through the shuffle gives the same one."""
    hashes = set()
    for passes in (1, 2, 3):
        world = make_world((50, 30), passes=passes, fan_out=2)
        run_shuffle(world)
        hashes.add(certify(world.pipeline, world.store, HOOK).manifest.facts["multiset_hash_after"])
    assert len(hashes) == 1


def test_few_rows_are_judged_by_their_hash_only() -> None:
    """The tails of a statistic of 50 rows mean nothing."""
    world = make_world((50, 30), passes=2, fan_out=2)
    run_shuffle(world)
    facts = certify(world.pipeline, world.store, HOOK).manifest.facts
    assert facts["passed"]
    assert not facts["is_order_judged"]


def test_an_order_that_is_not_mixed_is_a_fact_not_an_error() -> None:
    """The blocking check reads `passed`; people read which finding failed."""
    world = make_world((2000, 2000), passes=1)
    run_splits(world)
    gather_bucket(world.pipeline, world.store, HOOK, 0)
    rewrite(world, np.argsort)
    facts = certify(world.pipeline, world.store, HOOK).manifest.facts
    assert not facts["passed"]
    assert {"global_order", "document_lags", "successors"} <= set(facts["failed"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda n: np.arange(1, n),
            r"80 went in, 79 came out.*Shards with wrong counts: shard-00000\d \(\d+ in, \d+ out\); rows that are there twice: 0",
        ),
        (lambda n: np.r_[np.arange(n), 5], r"80 went in, 81 came out.*there twice: 1 \(shard-00000\d row \d+\)"),
        (lambda n: np.r_[np.arange(n - 1), 5], r"80 went in, 80 came out, and their multiset hashes differ.*there twice: 1"),
    ],
    ids=["dropped", "doubled", "one dropped, one doubled"],
)
def test_lost_and_doubled_rows_are_an_error_that_names_them(fault: object, message: str) -> None:
    """Training on them would go unnoticed for ever."""
    world = make_world((50, 30), passes=1)
    run_splits(world)
    gather_bucket(world.pipeline, world.store, HOOK, 0)
    rewrite(world, lambda ids: fault(len(ids)))  # type: ignore[operator] - the parameters above
    with pytest.raises(CertificateError, match=message):
        certify(world.pipeline, world.store, HOOK)


def test_a_row_that_got_another_rows_id_is_an_error() -> None:
    """Sums of rows and sums of ids would both be right; the hash is of pairs."""
    world = make_world((50, 30), passes=1)
    run_splits(world)
    gather_bucket(world.pipeline, world.store, HOOK, 0)
    rewrite(world, lambda ids: np.arange(len(ids)), swap_ids=True)
    with pytest.raises(CertificateError, match=r"80 went in, 80 came out, and their multiset hashes differ.*wrong counts: none; rows .* twice: 0"):
        certify(world.pipeline, world.store, HOOK)


def test_a_job_without_its_hash_is_named() -> None:
    """A manifest from elsewhere cannot vouch for rows."""
    world = make_world((50, 30), passes=1)
    run_splits(world)
    gather_bucket(world.pipeline, world.store, HOOK, 0)
    shard = open_mixed(world.pipeline, world.store, HOOK)[0]
    data = read_file(world.store, shard.ref.path, shard.manifest, "rows.safetensors")
    with create_artifact(world.store, shard.ref, replace=True) as art:
        art.put("rows.safetensors", data)
        art.facts |= {"n_rows": 80, "d_in": 4, "dtype": "float32"}
    with pytest.raises(ArtifactCorruptError, match="no readable fact 'source_multiset_hash'"):
        certify(world.pipeline, world.store, HOOK)


def rewrite(world, choose, *, swap_ids: bool = False) -> None:
    """Publish bucket 0 again with the rows that `choose(ids)` names, as a faulty gather would have hashed and written them."""
    shard = open_mixed(world.pipeline, world.store, HOOK)[0]
    rows, row_ids = read_mixed_rows(world.store, shard, 0, shard.n_rows)
    chosen = choose(row_ids.numpy())
    values, ids = rows.numpy()[chosen], row_ids.numpy()[chosen]
    if swap_ids:
        ids[[0, 1]] = ids[[1, 0]]
    with create_artifact(world.store, shard.ref, replace=True) as art:
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(ids), -1)
        save_mixed(art, [(ids, raw)], len(ids), RowFormat(4, "float32"))
        art.facts["source_multiset_hash"] = shard.manifest.facts["source_multiset_hash"]


def test_the_multiset_hash_is_a_hash_of_pairs_in_any_order_and_any_parts() -> None:
    """Mergeable, order-free, and blind to nothing that a pipeline gets wrong."""
    bits = stream(0, "hash").generator()
    for record_bytes in (8 + 1, 8 + 16, 8 + 1024):
        records = bits.integers(0, 256, (300, record_bytes), dtype=np.uint8)
        whole = hash_records(records)
        assert hash_records(records[bits.permutation(300)]) == whole
        assert hash_records(records[:100]).merge(hash_records(records[100:])) == whole
        assert MultisetHash.decode(whole.encode()) == whole
        ids = np.ascontiguousarray(records[:, :8]).view("<u8").reshape(-1)
        rows, kept = np.ascontiguousarray(records[:, 8:]), np.arange(0, 300, 7)
        assert hash_kept(ids[kept], rows, kept) == hash_records(records[kept])
        wrong = records.copy()
        wrong[[0, 1], :8] = records[[1, 0], :8]
        flipped = records.copy()
        flipped[17, -1] ^= 1
        assert len({whole, hash_records(wrong), hash_records(flipped), hash_records(records[1:]), hash_records(np.r_[records, records[:1]])}) == 5
    assert hash_records(np.zeros((0, 24), np.uint8)) == MultisetHash()


def test_expected_coincidences_are_exact() -> None:
    """Mean and variance over all 720 orders of six rows, for two kinds of pairs."""
    labels = (0, 0, 0, 1, 1, 2)
    for pairs in ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [(0, 3), (1, 4), (2, 5)], [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]):
        counts = [sum(order[a] == order[b] for a, b in pairs) for order in itertools.permutations(labels)]
        degrees = Counter(place for pair in pairs for place in pair)
        n_paths = sum(degree * (degree - 1) for degree in degrees.values())
        expected = expect_coincidences(6, len(pairs), n_paths, np.bincount(labels))
        assert expected == pytest.approx((np.mean(counts), np.var(counts)))


def test_expected_entropy_is_exact() -> None:
    """Against 4,000 draws of 20 rows."""
    documents = np.array([30, 10, 5, 0, 1])
    rows = np.repeat(np.arange(5), documents)
    bits = stream(0, "entropy").generator()
    found = []
    for _ in range(4000):
        share = np.bincount(bits.permutation(rows)[:20]) / 20
        found.append(-sum(p * math.log(p) for p in share if p))
    assert expected_entropy(documents, 20) == pytest.approx(np.mean(found), abs=4 * np.std(found) / math.sqrt(4000))


def test_p_values_agree_with_scipy() -> None:
    """Ours need no SciPy at run time."""
    assert normal_p(2.5) == pytest.approx(2 * stats.norm.sf(2.5))
    assert student_p(5.2, 60) == pytest.approx(2 * stats.t.sf(5.2, 60), rel=0.05)
    assert chi_square_p(30.0, 12, is_two_sided=False) == pytest.approx(stats.chi2.sf(30, 12))
    assert chi_square_p(1.0, 12, is_two_sided=True) == pytest.approx(2 * stats.chi2.cdf(1, 12))
    assert poisson_p(9, 2.0) == pytest.approx(2 * stats.poisson.sf(8, 2))
    assert poisson_p(0, 30.0) == pytest.approx(2 * stats.poisson.cdf(0, 30))
    assert coincidence_p(3, expect_coincidences(10, 5, 0, np.ones(10, np.int64))) == 0.0


def test_a_meter_wants_whole_buckets_in_order() -> None:
    """A bucket left out would be called a perfect shuffle of less."""
    meter = MixingMeter(layout(), [10, 20])
    with pytest.raises(AssertionError, match="buckets come in order and whole"):
        meter.add(np.zeros(20, np.uint64))
    with pytest.raises(AssertionError, match="all buckets must have been added"):
        meter.findings()


def test_plans_of_the_tests_are_what_they_say() -> None:
    """`run_splits` plans with the configured passes."""
    world = make_world((50, 30), passes=3, fan_out=2)
    run_splits(world)
    assert load_shuffle_plan(world.pipeline, world.store).sizes.passes == 3
