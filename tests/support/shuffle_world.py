"""A small world for the shuffle: token and activation shards whose rows tell which row they are, in a store in memory."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource, save_plan
from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.mixed import open_mixed, read_mixed_rows
from interp_assets.shuffle.plan import load_shuffle_plan, make_shuffle_plan
from interp_assets.shuffle.split import split_bucket, split_shard
from interp_assets.storage.manifest import create_artifact
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import save_tensors

HOOK = "resid_post.0"


class World(NamedTuple):
    """A pipeline, its store, and which rows of each training shard are valid."""

    pipeline: Pipeline
    store: Store
    valid: list[NDArray[np.bool_]]

    @property
    def row_ids(self) -> NDArray[np.uint64]:
        """All row ids that the shuffle must keep, in order of shard."""
        ids = [np.flatnonzero(mask).astype(np.uint64) + np.uint64((i + 1) << 40) for i, mask in enumerate(self.valid)]
        return np.concatenate(ids)


def make_world(
    shard_rows: Sequence[int],
    *,
    passes: int | None = 2,
    fan_out: int = 2,
    seed: int = 0,
    invalid_every: int = 0,
    hooks: Sequence[str] = (HOOK,),
    d_in: int = 4,
    dtype: str = "float32",
    memory_bytes: int = 1 << 30,
    store: Store | None = None,
) -> World:
    """Write training shards of `shard_rows` token positions (shard 0 is held out and absent); every `invalid_every`-th row is not valid.

    `passes` None: the plan chooses, and is saved.
    """
    shape = {"passes": passes, "fan_out": fan_out} if passes else {}
    config = make_config(
        {
            "name": "small",
            "seed": seed,
            "corpus": {"source": "files", "path": "nowhere", "context_length": 16, "held_out_shards": 1},
            "harvest": {"hook_points": list(hooks), "dtype": dtype},
            "shuffle": {**shape, "memory_bytes": memory_bytes},
            "saes": [{"name": "demo", "hook_point": hooks[0], "d_sae": 32, "k": 4}],
        }
    )
    sources = [
        ShardSource(index=i, fingerprint=f"text-{i}-{n}", n_documents=2, n_bytes=100, spec={"files": [f"{i}.txt"]})
        for i, n in enumerate([0, *shard_rows])
    ]
    plan = PipelinePlan(
        shards=sources,
        tokenizer_fingerprint="tokenizer",
        model_fingerprint="model",
        hook_widths={hook: d_in + at for at, hook in enumerate(hooks)},
        vocabulary_size=50,
        max_context=32,
    )
    pipeline = Pipeline(config, plan)
    store = open_store("memory://shuffle") if store is None else store
    if passes is None:
        save_plan(store, plan)
    valid = []
    for index, n_rows in enumerate(shard_rows, start=1):
        mask = np.ones(n_rows, bool)
        if invalid_every:
            mask[::invalid_every] = False
        valid.append(mask)
        write_tokens(pipeline, store, index, mask)
        for hook in hooks:
            write_activations(pipeline, store, hook, index, n_rows)
    return World(pipeline, store, valid)


def write_tokens(pipeline: Pipeline, store: Store, index: int, valid: NDArray[np.bool_]) -> None:
    """Write a token shard: documents of about ten rows."""
    n_rows = len(valid)
    rows = np.arange(n_rows)
    documents = rows // 10
    frame = pl.DataFrame(
        {
            "token_id": (rows % 50).astype(np.uint32),
            "context": (rows // 16).astype(np.uint32),
            "document": documents.astype(np.uint32),
            "valid": valid,
        }
    )
    first = np.arange(0, n_rows, 10)
    table = pl.DataFrame(
        {
            "document": np.arange(len(first)).astype(np.uint32),
            "source": [f"{index}/{i}" for i in range(len(first))],
            "first_row": first.astype(np.uint64),
            "n_rows": np.minimum(10, n_rows - first).astype(np.uint64),
        }
    )
    with create_artifact(store, token_shard_ref(pipeline, index), replace=True) as art:
        art.put("tokens.parquet", _parquet(frame), n_rows=n_rows)
        art.put("documents.parquet", _parquet(table), n_rows=len(first))
        art.facts |= {"n_rows": n_rows, "n_valid": int(valid.sum()), "n_documents": len(first)}


def row_values(hook: str, row_ids: NDArray[np.uint64], d_in: int) -> NDArray[np.float32]:
    """Return what the rows with these ids hold at a hook point: small integers that name shard, row and hook point."""
    shard, row = (row_ids >> np.uint64(40)).astype(np.float32), (row_ids & np.uint64((1 << 40) - 1)).astype(np.float32)
    values = np.zeros((len(row_ids), d_in), np.float32)
    values[:, 0], values[:, 1], values[:, 2] = shard, row % 128, row // 128
    values[:, 3] = int(hook[-1])
    return values


def write_activations(pipeline: Pipeline, store: Store, hook: str, index: int, n_rows: int) -> None:
    """Write an activation shard whose rows name themselves."""
    ids = np.arange(n_rows).astype(np.uint64) + np.uint64(index << 40)
    rows = torch.from_numpy(row_values(hook, ids, pipeline.d_in(hook))).to(getattr(torch, pipeline.config.harvest.dtype))
    with create_artifact(store, activation_shard_ref(pipeline, hook, index), replace=True) as art:
        save_tensors(art, "rows.safetensors", {"rows": rows}, n_rows=n_rows)
        art.facts |= {"n_rows": n_rows, "d_in": pipeline.d_in(hook)}


def run_splits(world: World, hook: str = HOOK) -> None:
    """Plan, and run all distributing passes of one hook point."""
    pipeline, store = world.pipeline, world.store
    make_shuffle_plan(pipeline, store)
    sizes = load_shuffle_plan(pipeline, store).sizes
    if sizes.passes > 1:
        for index in pipeline.train_indices:
            split_shard(pipeline, store, hook, index)
    for pass_index in range(2, sizes.passes):
        for bucket in range(sizes.n_inputs(pass_index)):
            split_bucket(pipeline, store, hook, pass_index, bucket)


def run_shuffle(world: World, hook: str = HOOK) -> list[NDArray[np.uint64]]:
    """Run a whole shuffle of one hook point, check that every row kept its content, and return the row ids of each mixed shard."""
    run_splits(world, hook)
    pipeline, store = world.pipeline, world.store
    for bucket in range(load_shuffle_plan(pipeline, store).sizes.n_buckets):
        gather_bucket(pipeline, store, hook, bucket)
    ids = []
    for shard in open_mixed(pipeline, store, hook):
        rows, row_ids = read_mixed_rows(store, shard, 0, shard.n_rows)
        assert np.array_equal(rows.float().numpy(), row_values(hook, row_ids.numpy(), pipeline.d_in(hook)))
        ids.append(row_ids.numpy())
    return ids


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()
