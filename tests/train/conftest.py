"""What the tests of this stage share: mixed shards and statistics of rows that are sparse sums of planted directions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from interp_assets.harvest.refs import statistics_ref
from interp_assets.harvest.statistics import STATISTICS, ActivationStatistics, as_tensors
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.shuffle.mixed import save_mixed
from interp_assets.shuffle.refs import mixed_shard_ref, n_mixed_shards
from interp_assets.shuffle.rows import RowFormat
from interp_assets.storage.manifest import create_artifact
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import as_bytes, save_tensors

HOOK = "resid_post.0"
OTHER = "mlp_out.0"
"""A second hook point, of half the width: its rows are a linear function of the first one's."""


class Planted(NamedTuple):
    """A pipeline whose mixed shards hold rows made from known directions."""

    pipeline: Pipeline
    store: Store
    directions: Tensor
    rows: Tensor
    """All rows, in the order of the shards."""


MakePlanted = Callable[..., Planted]


@pytest.fixture(scope="session")
def make_planted() -> MakePlanted:
    """Return a maker of planted data: `make_planted([sae fields, ...], n_rows=..., d_in=..., n_directions=...)`."""
    return _make_planted


def _make_planted(
    saes: list[dict[str, Any]], *, n_rows: int = 3000, d_in: int = 16, n_directions: int = 24, nan_row: int | None = None, root: str = "memory://"
) -> Planted:
    config = make_config(
        {
            "name": "planted",
            "root": root,
            "harvest": {"hook_points": [HOOK, OTHER]},
            "shuffle": {"fan_out": 3},
            "saes": [{"hook_point": HOOK, **fields} for fields in saes],
            "features": {"saes": []},
            "execution": {"device": "cpu", "profile_steps": 0},
        }
    )
    shards = [ShardSource(index=i, fingerprint=f"text-{i}", n_documents=2, n_bytes=100, spec={}) for i in range(3)]
    plan = PipelinePlan(
        shards=shards,
        tokenizer_fingerprint="t",
        model_fingerprint="m",
        hook_widths={HOOK: d_in, OTHER: d_in // 2},
        vocabulary_size=50,
        max_context=32,
    )
    pipeline = Pipeline(config, plan)
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(n_directions, d_in, generator=generator), dim=1)
    fires = torch.rand(n_rows, n_directions, generator=generator) < 2 / n_directions
    strengths = fires * (1 + torch.rand(n_rows, n_directions, generator=generator))
    mean = torch.randn(d_in, generator=generator)
    rows = (strengths @ directions + mean + 0.01 * torch.randn(n_rows, d_in, generator=generator)).to(torch.bfloat16)
    if nan_row is not None:
        rows[nan_row, 3] = float("nan")
    store = open_store(root).child(config.name)
    _write_rows(pipeline, store, rows, HOOK)
    mixing = torch.randn(d_in, d_in // 2, generator=generator)
    _write_rows(pipeline, store, (rows.float() @ mixing).to(torch.bfloat16), OTHER)
    return Planted(pipeline, store, directions, rows)


def _write_rows(pipeline: Pipeline, store: Store, rows: Tensor, hook_point: str) -> None:
    """Publish rows as mixed shards of unequal sizes, with their statistics."""
    n_shards, d_in = n_mixed_shards(pipeline), rows.shape[1]
    bounds = [0, *(len(rows) * (i + 1) // n_shards + (i % 2) for i in range(n_shards - 1)), len(rows)]
    for bucket in range(n_shards):
        part = rows[bounds[bucket] : bounds[bucket + 1]]
        ids = np.arange(bounds[bucket], bounds[bucket + 1], dtype=np.uint64)
        with create_artifact(store, mixed_shard_ref(pipeline, hook_point, bucket)) as art:
            fmt = RowFormat(d_in, "bfloat16")
            save_mixed(art, [(ids, np.frombuffer(as_bytes(part), np.uint8).reshape(-1, fmt.row_bytes))], len(part), fmt)
    exact = rows.double().nan_to_num()
    statistics = ActivationStatistics(
        len(rows), exact.sum(0), exact.square().sum(0), float(exact.norm(dim=1).sum()), torch.zeros(64, dtype=torch.int64)
    )
    with create_artifact(store, statistics_ref(pipeline, hook_point)) as art:
        save_tensors(art, STATISTICS, as_tensors(statistics))
