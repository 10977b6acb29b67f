"""Passes and fan-out that nobody states: valid from 1 MB to 100 PB, within the memory, and refused before any work where none fit."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shuffle_world import make_world

from interp_assets.errors import PlanError
from interp_assets.planning.config import MAX_MIXED_SHARDS
from interp_assets.planning.pipeline import Pipeline
from interp_assets.shuffle.choice import MAX_CHOSEN_PASSES, MAX_FAN_OUT, RANGE_BYTES, choose, find_obstacles, foresee, settle
from interp_assets.shuffle.estimate import estimate_passes
from interp_assets.shuffle.plan import ShardRows, job_bytes
from interp_assets.shuffle.refs import Shape, shuffle_plan_ref
from interp_assets.shuffle.rows import RowFormat
from interp_assets.shuffle.simulate import simulate
from interp_assets.shuffle.sizes import ShuffleSizes

FORMAT = RowFormat(1020, "float32")  # 4,088 bytes a record
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


def even_shards(n_rows: int, limit: int) -> list[ShardRows]:
    """Cut rows into shards of which each fits a job."""
    n_shards = max(1, -(-n_rows // max(1, limit)))
    sizes = [(i + 1) * n_rows // n_shards - i * n_rows // n_shards for i in range(n_shards)]
    return [ShardRows(i, size, size) for i, size in enumerate(sizes)]


@given(exponent=st.floats(6, 17), memory=st.sampled_from([64 * MIB, GIB, 8 * GIB, 128 * GIB, TIB, 4 * TIB]))
@settings(max_examples=150, deadline=None)
def test_every_choice_is_valid_and_within_memory(exponent: float, memory: int) -> None:
    """From 1 MB to 100 PB: jobs fit, partitions are not too many, no pass could be saved; what does not fit is refused with a memory that does."""
    n_rows, limit = round(10**exponent) // FORMAT.record_bytes + 1, memory // job_bytes(1, FORMAT)
    shards = even_shards(n_rows, max(limit // 2, n_rows // 5000))
    try:
        shape = choose(shards, FORMAT, memory)
    except PlanError as error:
        assert n_rows / limit > 0.99 * MAX_MIXED_SHARDS
        (need,) = re.findall(r"Set shuffle.memory_bytes to ([\d,]+) or more", str(error))
        assert choose(shards, FORMAT, int(need.replace(",", ""))).passes == MAX_CHOSEN_PASSES
        return
    sizes = ShuffleSizes(passes=shape.passes, fan_out=shape.fan_out, shard_rows=tuple(shard.n_valid for shard in shards))
    assert job_bytes(sizes.largest_bucket_rows, FORMAT) <= memory
    assert sizes.n_buckets <= MAX_MIXED_SHARDS
    assert shape.fan_out <= MAX_FAN_OUT
    if shape.passes == 2:
        assert n_rows > limit
        assert shape.fan_out == 2 or sizes.n_rows / (shape.fan_out - 1) > limit, "a smaller fan-out would do"
        assert shape.fan_out == 2 or n_rows / len(shards) / shape.fan_out * FORMAT.record_bytes > 0.99 * RANGE_BYTES, "ranges are large enough"


@pytest.mark.parametrize(
    ("data_bytes", "memory", "shape"),
    [
        (10**6, GIB, Shape(1, 1)),
        (10**9, GIB, Shape(1, 1)),
        (10**11, GIB, Shape(2, 94)),
        (2 * 10**12, GIB, Shape(3, 44)),
        (10**13, 64 * GIB, Shape(2, 147)),
        (10**15, 64 * GIB, Shape(2, 14_666)),
        (10**17, 2 * TIB, Shape(2, 45_831)),
    ],
)
def test_the_chosen_plan_adds_up_in_simulation(data_bytes: int, memory: int, shape: Shape) -> None:
    """Row numbers alone, through the real sizes and draws: every pass holds all rows, every job fits; known numbers."""
    limit = memory // job_bytes(1, FORMAT)
    n_rows = data_bytes // FORMAT.record_bytes
    assert choose(even_shards(n_rows, limit), FORMAT, memory) == shape
    plan = estimate_passes(n_rows, FORMAT.record_bytes, memory, shape)
    assert plan.memory_bytes <= memory
    if shape.passes > 1 and plan.n_buckets < 2000:
        assert simulate(plan, FORMAT.record_bytes).sizes.n_buckets == shape.fan_out ** (shape.passes - 1)


def test_what_is_chosen_is_the_identity() -> None:
    """A pipeline that states the numbers which another one's plan chose has the same ids: they share all bytes."""
    chosen, store, _ = make_world((40_000, 50_000), passes=None, d_in=16, memory_bytes=MIB)
    settled = settle(chosen, store)
    assert settled.plan.shuffle is not None
    assert settled.plan.shuffle[:2] == (3, 3)
    stated = make_world((40_000, 50_000), passes=3, fan_out=3, d_in=16, memory_bytes=MIB)[0]
    assert shuffle_plan_ref(stated) == shuffle_plan_ref(settled)
    roomy = make_world((40_000, 50_000), passes=None, d_in=16, memory_bytes=GIB)[0]
    kept = Pipeline(roomy.config, settled.plan)
    assert settle(kept, store).plan == kept.plan


def test_a_forecast_foresees_what_is_chosen() -> None:
    """`interp plan` shows the numbers before the rows are counted; where they are known, they are the same."""
    pipeline, store, _ = make_world((40_000, 50_000), passes=None, d_in=16, memory_bytes=MIB)
    assert foresee(pipeline, store).plan.shuffle == settle(pipeline, store).plan.shuffle


def test_what_cannot_fit_is_known_before_the_harvest() -> None:
    """Tokens are there, and no activation is: a mixed shard that is too large, or a training shard, is refused with the value of the knob."""
    pipeline, store, _ = make_world((40_000, 50_000), passes=2, fan_out=2, d_in=16, memory_bytes=MIB)
    (said,) = find_obstacles(pipeline, store)
    assert "a mixed shard of 45,000 rows needs 4,680,000 bytes: raise shuffle.fan_out from 2 to 9" in said
    assert "a training shard of 50,000 rows" in said
    fitting, store, _ = make_world((9000,) * 10, passes=2, fan_out=9, d_in=16, memory_bytes=MIB)
    assert find_obstacles(fitting, store) == []


def test_hub_users_are_told_the_knob_that_they_have() -> None:
    """A dataset is cut by documents, not by bytes: `corpus.shard_bytes` would change nothing."""
    pipeline, store, _ = make_world((40_000, 50_000), passes=2, fan_out=9, d_in=16, memory_bytes=MIB)
    hub = pipeline.config.corpus.model_copy(update={"source": "huggingface", "documents_per_shard": 500})
    pipeline = replace(pipeline, config=pipeline.config.model_copy(update={"corpus": hub}))
    (said,) = find_obstacles(pipeline, store)
    assert "(`corpus.documents_per_shard`, about 100)" in said
    assert "shard_bytes" not in said
