"""The rows that the shuffle benchmark works on: activation shards of random bytes, written and described once for all contenders."""

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from interp_assets.compute.seeds import stream
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import SHARD_SHIFT, Pipeline, PipelinePlan, ShardSource
from interp_assets.shuffle.certificate import P_FAIL, load_layout
from interp_assets.shuffle.mixing import MixingMeter
from interp_assets.shuffle.plan import load_shuffle_plan, make_shuffle_plan
from interp_assets.shuffle.sizes import shares
from interp_assets.storage.manifest import create_artifact, load_manifest
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import TensorSpec, read_row_bytes, read_spans, save_stream

HOOK = "resid_post.0"
DOCUMENT_ROWS = 250
BLOCK_ROWS = 1 << 15


class Setting(NamedTuple):
    """What is shuffled, and where."""

    folder: Path
    root: str
    """Where our artifacts lie: a folder, or s3://bucket/prefix."""
    n_shards: int
    shard_rows: int
    d_in: int
    fan_out: int
    memory_bytes: int
    """What a contender may use in all."""
    passes: int = 2

    @property
    def n_rows(self) -> int:
        """All rows."""
        return self.n_shards * self.shard_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of bfloat16."""
        return 2 * self.d_in

    @property
    def gigabytes(self) -> float:
        """Size of all rows."""
        return self.n_rows * self.row_bytes / 1e9


class Timed(NamedTuple):
    """One contender's result."""

    wall_s: float
    rss_gb: float
    """Peak memory, all its processes together."""
    cpu_s: float
    mixing: list[str] | None
    """Findings of the certificate's battery that refuse the order, or None when there is no order to judge."""


def make_pipeline(setting: Setting) -> tuple[Pipeline, Store]:
    """Return the pipeline of the benchmark's rows, and its store."""
    config = make_config(
        {
            "name": "bench",
            "corpus": {"source": "files", "path": "nowhere", "held_out_shards": 1},
            "harvest": {"hook_points": [HOOK]},
            "shuffle": {"passes": setting.passes, "fan_out": setting.fan_out, "memory_bytes": setting.memory_bytes},
            "saes": [{"name": "demo", "hook_point": HOOK}],
        }
    )
    shards = [ShardSource(index=i, fingerprint=str(i), n_documents=1, n_bytes=1, spec={}) for i in range(setting.n_shards + 1)]
    plan = PipelinePlan(
        shards=shards, tokenizer_fingerprint="t", model_fingerprint="m", hook_widths={HOOK: setting.d_in}, vocabulary_size=1, max_context=2
    )
    return Pipeline(config, plan), open_store(setting.root)


def write_shards(setting: Setting) -> None:
    """Write the rows as activation shards with their token shards."""
    pipeline, store = make_pipeline(setting)
    for index in range(1, setting.n_shards + 1):
        _save_tokens(pipeline, store, index, setting.shard_rows)
        with create_artifact(store, activation_shard_ref(pipeline, HOOK, index)) as art:
            specs = {"rows": TensorSpec("bfloat16", (setting.shard_rows, setting.d_in))}
            save_stream(art, "rows.safetensors", specs, (rows.tobytes() for _, rows in random_rows(setting, index)), n_rows=setting.shard_rows)
            art.facts |= {"n_rows": setting.shard_rows}


def random_rows(setting: Setting, index: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """Draw the rows of shard `index`, block by block: their row ids `[n]` and bytes `[n, row_bytes]`."""
    bits = stream(0, "bench", index)
    for first in range(0, setting.shard_rows, BLOCK_ROWS):
        n = min(BLOCK_ROWS, setting.shard_rows - first)
        rows = bits.words(n * setting.row_bytes // 8).view(np.uint8).reshape(n, setting.row_bytes)
        yield np.arange(first, first + n, dtype=np.uint64) + np.uint64(index << SHARD_SHIFT), rows


def write_parquet(setting: Setting) -> Path:
    """Write the rows with their ids as one Parquet file, for the peers."""
    path = setting.folder / "rows.parquet"
    schema = pa.schema([("row_id", pa.uint64()), ("row", pa.binary(setting.row_bytes))])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for index in range(1, setting.n_shards + 1):
            for ids, rows in random_rows(setting, index):
                column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(setting.row_bytes), len(ids), [None, pa.py_buffer(rows)])
                writer.write_table(pa.table([pa.array(ids), column], schema=schema), row_group_size=1 << 16)
    return path


def source_files(setting: Setting) -> list[Path]:
    """Return the files of the activation shards, when they lie on a local disk."""
    return sorted((Path(setting.root) / "2-activations").rglob("rows.safetensors"))


def read_shard(setting: Setting, store: Store, pipeline: Pipeline, index: int) -> bytes:
    """Read the rows of one activation shard through the store."""
    ref = activation_shard_ref(pipeline, HOOK, index)
    manifest = load_manifest(store, ref)
    span = read_spans(store, ref.path, manifest, "rows.safetensors")["rows"]
    return read_row_bytes(store, ref.path, manifest, "rows.safetensors", span, 0, setting.shard_rows)


def judge(setting: Setting, row_ids: NDArray[np.uint64]) -> list[str]:
    """Return which findings of the certificate refuse an order of all rows."""
    pipeline, store = make_pipeline(setting)
    make_shuffle_plan(pipeline, store)
    sizes = shares(len(row_ids), setting.fan_out)
    meter = MixingMeter(load_layout(pipeline, store, load_shuffle_plan(pipeline, store)), sizes)
    for part in np.split(row_ids.astype(np.uint64), np.cumsum(sizes)[:-1]):
        meter.add(part)
    return [finding.name for finding in meter.findings().findings if finding.p < P_FAIL]


def fresh(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def drop_cache(path: Path) -> None:
    """Ask the kernel to forget the pages of the files below a path, so that reads are cold."""
    os.sync()
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _save_tokens(pipeline: Pipeline, store: Store, index: int, n: int) -> None:
    """Write the token shard of `n` valid rows."""
    first = np.arange(0, n, DOCUMENT_ROWS)
    zeros = np.zeros(n, np.uint32)
    tokens = {"token_id": zeros, "context": zeros, "document": (np.arange(n) // DOCUMENT_ROWS).astype(np.uint32), "valid": np.ones(n, bool)}
    documents = {
        "document": np.arange(len(first)).astype(np.uint32),
        "source": [""] * len(first),
        "first_row": first.astype(np.uint64),
        "n_rows": np.minimum(DOCUMENT_ROWS, n - first).astype(np.uint64),
    }
    with create_artifact(store, token_shard_ref(pipeline, index)) as art:
        for name, columns in (("tokens.parquet", tokens), ("documents.parquet", documents)):
            buffer = io.BytesIO()
            pq.write_table(pa.table(columns), buffer)
            art.put(name, buffer.getvalue())
        art.facts |= {"n_rows": n, "n_valid": n}
