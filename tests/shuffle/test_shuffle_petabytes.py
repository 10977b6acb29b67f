"""`passes: auto` for a petabyte and for a hundred: pipelines of that size, planned from row numbers alone, with what grows beside the shards."""

import pytest

from interp_assets.corpus.sizes import TEXT_BYTES_PER_TOKEN, count_rows
from interp_assets.planning.config import make_config
from interp_assets.planning.machine import Prices
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.shuffle.choice import foresee
from interp_assets.shuffle.estimate import estimate_passes
from interp_assets.shuffle.plan import row_formats
from interp_assets.shuffle.refs import shape_of
from interp_assets.storage.store import Store

POINTS = ["resid_post.6", "resid_post.12", "mlp_out.12"]
WIDTH = 4096
N_SHARDS = 300
GIB, TIB = 1 << 30, 1 << 40


def make_pipeline(data_bytes: int, memory_bytes: int, n_shards: int) -> Pipeline:
    """Return a pipeline whose training rows are so many bytes at each of three hook points: 3 of its shards held out, 5 waiting for a retraining."""
    config = make_config(
        {
            "name": "large",
            "corpus": {"source": "files", "path": "nowhere", "held_out_shards": 3},
            "harvest": {"hook_points": POINTS, "dtype": "bfloat16"},
            "shuffle": {"memory_bytes": memory_bytes},
            "saes": [{"name": "demo", "hook_point": POINTS[0]}],
        }
    )
    n_bytes = data_bytes // (2 * WIDTH + 8) // (n_shards - 8) * TEXT_BYTES_PER_TOKEN
    shards = [ShardSource(index=i, fingerprint=f"{i}", n_documents=1, n_bytes=n_bytes, spec={}) for i in range(n_shards)]
    plan = PipelinePlan(
        shards=shards,
        tokenizer_fingerprint="tokenizer",
        model_fingerprint="model",
        hook_widths=dict.fromkeys(POINTS, WIDTH),
        vocabulary_size=50,
        max_context=1024,
        generations=[n_shards - 5],
    )
    return Pipeline(config, plan)


@pytest.mark.parametrize(("data_bytes", "memory_bytes", "fan_out"), [(10**15, 64 * GIB, 14_609), (10**17, 2 * TIB, 45_653)])
def test_a_plan_of_petabytes_is_chosen_and_priced(memory_store: Store, data_bytes: int, memory_bytes: int, fan_out: int) -> None:
    """Held-out and pending shards have no share; every hook point is shuffled alike; every pass holds all rows, and no job more than its memory."""
    pipeline = foresee(make_pipeline(data_bytes, memory_bytes, N_SHARDS), memory_store)
    assert len(pipeline.train_indices) == N_SHARDS - 8
    shape = shape_of(pipeline)
    assert shape == (2, fan_out)
    n_rows = count_rows(pipeline, memory_store, pipeline.train_indices)
    (row_bytes,) = {item.record_bytes for item in row_formats(pipeline)}
    assert len(row_formats(pipeline)) == len(POINTS)
    plan = estimate_passes(n_rows, row_bytes, memory_bytes, shape)
    assert plan.memory_bytes <= memory_bytes
    assert data_bytes * 0.99 < plan.data_bytes <= data_bytes
    assert plan.bytes_moved == 2 * 2 * plan.data_bytes


def test_requests_and_dollars_follow_the_provider() -> None:
    """A store whose requests cost nothing leaves the workers; one with twice the price has twice the bill of requests, and as many of them."""
    shape = (2, 14_666)
    base = estimate_passes(10**11, 8200, 64 * GIB, shape)
    free = estimate_passes(10**11, 8200, 64 * GIB, shape, Prices(put_usd=0.0, get_usd=0.0))
    twice = estimate_passes(10**11, 8200, 64 * GIB, shape, Prices(put_usd=1e-5, get_usd=8e-7))
    assert free.usd == base.worker_usd
    assert twice.request_usd == pytest.approx(2 * base.request_usd)
    assert (twice.get_requests, twice.put_requests) == (base.get_requests, base.put_requests)
