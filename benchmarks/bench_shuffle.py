"""The shuffle beside the sequential-I/O floor, its peers and the schemes it replaces: seconds, memory and mixing, in one run.

    python benchmarks/bench_shuffle.py                     small: 0.25 GB, ends within 45 s on 2 cores
    python benchmarks/bench_shuffle.py --gb 4 --peers duckdb polars datasets
    python benchmarks/bench_shuffle.py --gb 16 --memory-gb 2 --folder /mnt/disk

Sketch before code: two passes read and write every byte twice, so the floor is two sequential copies by as many processes, with fsync.
Everybody reads the same rows (1 KB of bfloat16 and a row id) from a local disk, cold where the kernel lets us drop its cache, and writes
them shuffled and synced. One JSON line a row:

    name, value, unit      seconds, wall clock
    ours                   seconds of this project's shuffle (its best number of processes)
    ratio_to_floor         value / floor: times the sequential copies of the same run
    ratio_to_best_peer     best peer / value: above 1 is faster than the best peer of the same run
    rss_gb, mixing         peak memory of a process; findings of the certificate's battery that refuse the order (empty: none)

Ratios are of one run on one machine; bare seconds are not to be compared between runs.
"""

import argparse
import io
import json
import multiprocessing as mp
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from interp_assets.config import make_config
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.manifest import create_artifact
from interp_assets.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.seeds import stream
from interp_assets.shuffle.certificate import P_FAIL, load_layout
from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.mixed import open_mixed, read_mixed_ids
from interp_assets.shuffle.mixing import MixingMeter
from interp_assets.shuffle.plan import load_shuffle_plan, make_shuffle_plan
from interp_assets.shuffle.refs import FOLDER
from interp_assets.shuffle.rows import SHARD_SHIFT
from interp_assets.shuffle.sizes import shares
from interp_assets.shuffle.split import split_shard
from interp_assets.store import ObjectStore, open_store
from interp_assets.tensors import TensorSpec, save_stream

HOOK = "resid_post.0"
DOCUMENT_ROWS = 250
PIECE = 8 << 20


class Setting(NamedTuple):
    """What is shuffled, and where."""

    folder: Path
    n_shards: int
    shard_rows: int
    d_in: int
    fan_out: int
    memory_bytes: int

    @property
    def n_rows(self) -> int:
        """All rows."""
        return self.n_shards * self.shard_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of bfloat16."""
        return 2 * self.d_in


class Timed(NamedTuple):
    """One contender's result."""

    wall_s: float
    rss_gb: float
    mixing: list[str] | None


def make_pipeline(setting: Setting) -> tuple[Pipeline, ObjectStore]:
    """Return the pipeline of the benchmark's rows, and its store."""
    config = make_config(
        {
            "name": "bench",
            "corpus": {"source": "files", "path": "nowhere", "held_out_shards": 1},
            "harvest": {"hook_points": [HOOK]},
            "shuffle": {"passes": 2, "fan_out": setting.fan_out, "memory_bytes": setting.memory_bytes},
            "saes": [{"name": "demo", "hook_point": HOOK}],
        }
    )
    shards = [ShardSource(index=i, fingerprint=str(i), n_documents=1, n_bytes=1, spec={}) for i in range(setting.n_shards + 1)]
    plan = PipelinePlan(
        shards=shards, tokenizer_fingerprint="t", model_fingerprint="m", hook_widths={HOOK: setting.d_in}, vocabulary_size=1, max_context=2
    )
    return Pipeline(config, plan), open_store(str(setting.folder / "ours"))


def write_inputs(setting: Setting) -> None:
    """Write the rows as activation shards, and once more as one Parquet file for the peers."""
    pipeline, store = make_pipeline(setting)
    n, d_in = setting.shard_rows, setting.d_in
    schema = pa.schema([("row_id", pa.uint64()), ("row", pa.binary(setting.row_bytes))])
    with pq.ParquetWriter(setting.folder / "rows.parquet", schema, compression="none", use_dictionary=False) as writer:
        for index in range(1, setting.n_shards + 1):
            rows = stream(0, "bench", index).words(n * setting.row_bytes // 8)
            save_tokens(pipeline, store, index, n)
            with create_artifact(store, activation_shard_ref(pipeline, HOOK, index)) as art:
                save_stream(art, "rows.safetensors", {"rows": TensorSpec("bfloat16", (n, d_in))}, [rows.tobytes()], n_rows=n)
                art.facts |= {"n_rows": n}
            ids = np.arange(n, dtype=np.uint64) + np.uint64(index << SHARD_SHIFT)
            column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(setting.row_bytes), n, [None, pa.py_buffer(rows)])
            writer.write_table(pa.table([pa.array(ids), column], schema=schema), row_group_size=1 << 16)


def save_tokens(pipeline: Pipeline, store: ObjectStore, index: int, n: int) -> None:
    """Write the token shard of `n` valid rows."""
    first = np.arange(0, n, DOCUMENT_ROWS)
    zeros = np.zeros(n, np.uint32)
    tokens = {"token_id": zeros, "context": zeros, "document": (np.arange(n) // DOCUMENT_ROWS).astype(np.uint32), "valid": np.ones(n, bool)}
    counts = np.minimum(DOCUMENT_ROWS, n - first).astype(np.uint64)
    documents = {
        "document": np.arange(len(first)).astype(np.uint32),
        "source": [""] * len(first),
        "first_row": first.astype(np.uint64),
        "n_rows": counts,
    }
    with create_artifact(store, token_shard_ref(pipeline, index)) as art:
        for name, columns in (("tokens.parquet", tokens), ("documents.parquet", documents)):
            buffer = io.BytesIO()
            pq.write_table(pa.table(columns), buffer)
            art.put(name, buffer.getvalue())
        art.facts |= {"n_rows": n, "n_valid": n}


def warm_up(_: int) -> None:
    """Import what a worker needs before the clock runs."""


def split_one(setting: Setting, index: int) -> float:
    """Run one split job; return the worker's peak memory in GB."""
    split_shard(*make_pipeline(setting), HOOK, index)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def gather_one(setting: Setting, bucket: int) -> float:
    """Run one gather job; return the worker's peak memory in GB."""
    gather_bucket(*make_pipeline(setting), HOOK, bucket)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def copy_one(source: Path, target: Path) -> None:
    """Copy a file sequentially through one buffer, and sync it."""
    buffer = memoryview(bytearray(PIECE))
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while n := reader.readinto(buffer):
            writer.write(buffer[:n])
        os.fsync(writer.fileno())


def time_ours(setting: Setting, n_processes: int) -> Timed:
    """Shuffle with this project, jobs spread over processes, and measure the mixing afterwards."""
    pipeline, store = make_pipeline(setting)
    shutil.rmtree(setting.folder / "ours" / FOLDER, ignore_errors=True)
    make_shuffle_plan(pipeline, store)
    with ProcessPoolExecutor(n_processes, mp.get_context("spawn")) as pool:
        list(pool.map(warm_up, range(n_processes * 4)))
        drop_cache(setting.folder / "ours" / "2-activations")
        started = time.perf_counter()
        rss = list(pool.map(split_one, [setting] * setting.n_shards, pipeline.train_indices))
        rss += pool.map(gather_one, [setting] * setting.fan_out, range(setting.fan_out))
        wall_s = time.perf_counter() - started
    shards = open_mixed(pipeline, store, HOOK)
    return Timed(wall_s, max(rss), judge(setting, np.concatenate([read_mixed_ids(store, shard, 0, shard.n_rows) for shard in shards])))


def time_floor(setting: Setting, n_processes: int) -> Timed:
    """Copy all rows twice, as many files and processes as ours."""
    sources = sorted((setting.folder / "ours" / "2-activations").rglob("rows.safetensors"))
    folder = fresh(setting.folder / "floor")
    with ProcessPoolExecutor(n_processes, mp.get_context("spawn")) as pool:
        list(pool.map(warm_up, range(n_processes * 4)))
        drop_cache(setting.folder / "ours" / "2-activations")
        started = time.perf_counter()
        for stage in range(2):
            targets = [folder / f"{stage}-{i}" for i in range(len(sources))]
            list(pool.map(copy_one, sources, targets))
            sources = targets
        wall_s = time.perf_counter() - started
    shutil.rmtree(folder)
    return Timed(wall_s, 0.0, None)


def time_script(setting: Setting, script: str) -> Timed:
    """Run a peer in a process of its own, from `rows.parquet` to a synced file; it prints its seconds, imports excluded."""
    folder = fresh(setting.folder / "peer")
    drop_cache(setting.folder / "rows.parquet")
    names = {"SOURCE": str(setting.folder / "rows.parquet"), "TARGET": str(folder), "MEMORY": str(setting.memory_bytes)}
    prologue = "import os, time, resource\nsource, target, memory = (os.environ[k] for k in ('SOURCE', 'TARGET', 'MEMORY'))\n"
    epilogue = (
        "for name in os.listdir(target):\n    fd = os.open(os.path.join(target, name), os.O_RDONLY); os.fsync(fd); os.close(fd)\n"
        "print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prologue + script + epilogue], env={**os.environ, **names}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    wall_s, rss_gb = (float(word) for word in done.stdout.split()[-2:])
    files = sorted(folder.rglob("*.parquet"))
    ids = np.concatenate([pq.read_table(file, columns=["row_id"])["row_id"].to_numpy() for file in files]) if files else None
    shutil.rmtree(folder)
    return Timed(wall_s, rss_gb, None if ids is None else judge(setting, ids))


PEERS = {
    "duckdb": """import duckdb
started = time.perf_counter()
db = duckdb.connect()
db.execute(f"set memory_limit = '{int(memory)}B'; set temp_directory = '{target}/tmp'; set preserve_insertion_order = true")
db.execute(f"copy (select * from '{source}' order by random()) to '{target}/out.parquet' (format parquet, compression uncompressed)")
db.close()
import shutil; shutil.rmtree(f'{target}/tmp', ignore_errors=True)
""",
    "polars": """import polars as pl
started = time.perf_counter()
pl.read_parquet(source).sample(fraction=1, shuffle=True, seed=0).write_parquet(f'{target}/out.parquet', compression='uncompressed')
""",
    "datasets": """import datasets
datasets.disable_progress_bars()
started = time.perf_counter()
data = datasets.Dataset.from_parquet(source, cache_dir=f'{target}/cache', keep_in_memory=False)
data.shuffle(seed=0).flatten_indices(cache_file_name=f'{target}/flat.arrow').to_parquet(f'{target}/out.parquet', compression='none')
import shutil; shutil.rmtree(f'{target}/cache')
""",
}


def time_read_all(setting: Setting) -> Timed:
    """K jobs read everything and keep one bucket each: the scheme everyone outgrows. One process, rows in NumPy."""
    folder = fresh(setting.folder / "read_all")
    drop_cache(setting.folder / "ours" / "2-activations")
    sources = sorted((setting.folder / "ours" / "2-activations").rglob("rows.safetensors"))
    started, met = time.perf_counter(), []
    for bucket in range(setting.fan_out):
        rows, ids = [], []
        for index, source in enumerate(sources, start=1):
            label = stream(0, "read all", index).words(setting.shard_rows) % np.uint64(setting.fan_out)
            chosen = np.flatnonzero(label == bucket)
            data = np.fromfile(source, np.uint8, offset=4096).reshape(setting.shard_rows, setting.row_bytes)
            rows.append(data[chosen])
            ids.append(chosen.astype(np.uint64) + np.uint64(index << SHARD_SHIFT))
        order = stream(0, "read all bucket", bucket).permutation(sum(map(len, ids)))
        with (folder / str(bucket)).open("wb") as file:
            file.write(np.concatenate(rows)[order].data)
            os.fsync(file.fileno())
        met.append(np.concatenate(ids)[order])
    wall_s = time.perf_counter() - started
    shutil.rmtree(folder)
    return Timed(wall_s, 0.0, judge(setting, np.concatenate(met)))


def time_buffer(setting: Setting) -> Timed:
    """A mixing buffer in memory, the field's usual way: fill it, shuffle it, emit half, fill it again. One process."""
    folder = fresh(setting.folder / "buffer")
    drop_cache(setting.folder / "ours" / "2-activations")
    sources = sorted((setting.folder / "ours" / "2-activations").rglob("rows.safetensors"))
    half = max(1, min(setting.memory_bytes // (2 * setting.row_bytes), setting.n_rows // 8))
    held, held_ids, met = np.zeros((0, setting.row_bytes), np.uint8), np.zeros(0, np.uint64), []
    bits, started = stream(0, "buffer"), time.perf_counter()
    with (folder / "rows").open("wb") as file:
        for index, source in enumerate(sources, start=1):
            for first in range(0, setting.shard_rows, half):
                n = min(half, setting.shard_rows - first)
                data = np.fromfile(source, np.uint8, count=n * setting.row_bytes, offset=4096 + first * setting.row_bytes).reshape(n, -1)
                ids = np.arange(first, first + n, dtype=np.uint64) + np.uint64(index << SHARD_SHIFT)
                order = bits.permutation(len(held) + n)
                held, held_ids = np.concatenate([held, data])[order], np.concatenate([held_ids, ids])[order]
                keep = min(half, len(held))
                file.write(np.ascontiguousarray(held[keep:]).data)
                met.append(held_ids[keep:])
                held, held_ids = held[:keep], held_ids[:keep]
        file.write(np.ascontiguousarray(held).data)
        os.fsync(file.fileno())
    wall_s = time.perf_counter() - started
    shutil.rmtree(folder)
    return Timed(wall_s, 0.0, judge(setting, np.concatenate([*met, held_ids])))


def judge(setting: Setting, row_ids: np.ndarray) -> list[str]:
    """Return which findings refuse an order of all rows."""
    pipeline, store = make_pipeline(setting)
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
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    """Run all contenders and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.25, help="GB of rows")
    parser.add_argument("--row-bytes", type=int, default=1024, help="bytes of a row")
    parser.add_argument("--fan-out", type=int, default=8, help="buckets")
    parser.add_argument("--memory-gb", type=float, default=2.0, help="memory of a job, and DuckDB's limit")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="numbers of processes to run ours with")
    parser.add_argument("--peers", nargs="*", default=["duckdb", "polars"], choices=list(PEERS))
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-shuffle-") as folder:
        n_rows = int(options.gb * 1e9) // options.row_bytes
        setting = Setting(Path(folder), 8, n_rows // 8, options.row_bytes // 2, options.fan_out, int(options.memory_gb * 1e9))
        print_rows(run_all(setting, options.processes, options.peers), setting)


def run_all(setting: Setting, processes: list[int], peers: list[str]) -> dict[str, Timed]:
    """Time every contender, one after the other, on the same rows."""
    write_inputs(setting)
    contenders: dict[str, Callable[[], Timed]] = {
        f"floor: two sequential copies, {n} processes": lambda n=n: time_floor(setting, n) for n in processes
    }
    contenders |= {f"ours, {n} processes": lambda n=n: time_ours(setting, n) for n in processes}
    contenders |= {f"peer: {name}": lambda name=name: time_script(setting, PEERS[name]) for name in peers}
    contenders |= {"outgrown: K jobs read all": lambda: time_read_all(setting), "outgrown: mixing buffer": lambda: time_buffer(setting)}
    return {name: work() for name, work in contenders.items()}


def print_rows(found: dict[str, Timed], setting: Setting) -> None:
    """Print one JSON object a line."""

    def best(prefix: str) -> float | None:
        return min((timed.wall_s for name, timed in found.items() if name.startswith(prefix)), default=None)

    floor, ours, peer = best("floor"), best("ours"), best("peer")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    config = {"gb": round(setting.n_rows * setting.row_bytes / 1e9, 3), "row_bytes": setting.row_bytes, "fan_out": setting.fan_out, "passes": 2}
    for name, timed in found.items():
        row: dict[str, Any] = {
            "name": name,
            "value": round(timed.wall_s, 3),
            "unit": "s",
            "ours": None if ours is None else round(ours, 3),
            "ratio_to_floor": None if floor is None else round(timed.wall_s / floor, 3),
            "ratio_to_best_peer": None if peer is None else round(peer / timed.wall_s, 3),
            "rss_gb": round(timed.rss_gb, 3),
            "mixing": timed.mixing,
            "config": config,
            "commit": commit,
            "cpus": os.cpu_count(),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
