"""The shuffles that people use instead: libraries, GNU's tools, and the two schemes that are outgrown.

Each is timed from cold input on the disk to synced output on the disk, imports excluded, and its order goes through the same battery as
ours. The outgrown schemes read our activation shards, the libraries one Parquet file, GNU's tools one row a line (base64: a third more
bytes). A contender that is not installed is left out.
"""

import base64
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from shuffle_rows import Setting, Timed, drop_cache, fresh, judge, random_rows, source_files

from interp_assets.compute.seeds import stream
from interp_assets.planning.pipeline import SHARD_SHIFT

LIBRARIES = {
    "duckdb": """import duckdb
started = time.perf_counter()
db = duckdb.connect()
db.execute(f"set memory_limit = '{int(memory)}B'; set temp_directory = '{target}/tmp'; set preserve_insertion_order = true")
db.execute(f"copy (select * from '{source}' order by random()) to '{target}/out.parquet' (format parquet, compression uncompressed)")
db.close()
shutil.rmtree(f'{target}/tmp', ignore_errors=True)
""",
    "polars": """import polars as pl
started = time.perf_counter()
pl.read_parquet(source).sample(fraction=1, shuffle=True, seed=0).write_parquet(f'{target}/out.parquet', compression='uncompressed')
""",
    "datasets": """import datasets
datasets.disable_progress_bars()
started = time.perf_counter()
data = datasets.Dataset.from_parquet(source, cache_dir=f'{target}/cache', keep_in_memory=False)
data.shuffle(seed=0).flatten_indices(cache_file_name=f'{target}/out.arrow')
shutil.rmtree(f'{target}/cache')
""",
}
GNU = {
    "gnu-shuf": "shuf -o {target}/out.txt {source}",
    "gnu-sort": "sort --random-sort -S {megabytes}M -T {target} -o {target}/out.txt {source}",
}
PEERS = [*LIBRARIES, *GNU]
PROLOGUE = "import os, time, resource, shutil\nsource, target, memory = (os.environ[k] for k in ('SOURCE', 'TARGET', 'MEMORY'))\n"
EPILOGUE = """for name in os.listdir(target):
    fd = os.open(os.path.join(target, name), os.O_RDONLY); os.fsync(fd); os.close(fd)
used = resource.getrusage(resource.RUSAGE_SELF)
print(time.perf_counter() - started, used.ru_maxrss / 1e6, used.ru_utime + used.ru_stime)
"""


def has_peer(name: str) -> bool:
    """Return whether a peer is installed."""
    return importlib.util.find_spec(name) is not None if name in LIBRARIES else shutil.which(GNU[name].split()[0]) is not None


def time_peer(setting: Setting, name: str) -> Timed:
    """Run a peer in a process of its own, from its input file to a synced file, and judge its order."""
    return _time_library(setting, LIBRARIES[name]) if name in LIBRARIES else _time_gnu(setting, GNU[name])


def _time_library(setting: Setting, script: str) -> Timed:
    folder = fresh(setting.folder / "peer")
    drop_cache(setting.folder / "rows.parquet")
    names = {"SOURCE": str(setting.folder / "rows.parquet"), "TARGET": str(folder), "MEMORY": str(setting.memory_bytes)}
    command = [sys.executable, "-c", PROLOGUE + script + EPILOGUE]
    done = subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    wall_s, rss_gb, cpu_s = (float(word) for word in done.stdout.split()[-3:])
    mixing = judge(setting, _read_ids(folder))
    shutil.rmtree(folder)
    return Timed(wall_s, rss_gb, cpu_s, mixing)


def _read_ids(folder: Path) -> NDArray[np.uint64]:
    """Read the row ids that a library wrote, in order."""
    if (folder / "out.parquet").exists():
        return pq.read_table(folder / "out.parquet", columns=["row_id"])["row_id"].to_numpy()
    with pa.memory_map(str(folder / "out.arrow")) as file:
        return np.concatenate([batch["row_id"].to_numpy().copy() for batch in pa.ipc.open_stream(file)])


def write_text(setting: Setting) -> Path:
    """Write the rows as lines, `<row id> <base64>`, for GNU's tools."""
    path = setting.folder / "rows.txt"
    with path.open("wb") as file:
        for index in range(1, setting.n_shards + 1):
            for ids, rows in random_rows(setting, index):
                file.writelines(b"%d %s\n" % (row_id, base64.b64encode(row)) for row_id, row in zip(ids.tolist(), rows, strict=True))
    return path


def _time_gnu(setting: Setting, template: str) -> Timed:
    folder = fresh(setting.folder / "peer")
    source, target = setting.folder / "rows.txt", folder / "out.txt"
    if not source.exists():
        write_text(setting)
    drop_cache(source)
    command = template.format(source=source, target=folder, megabytes=setting.memory_bytes // 2 >> 20).split()
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C"})
    flush(target)
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with target.open("rb") as file:
        ids = np.fromiter((int(line[: line.index(b" ")]) for line in file), np.uint64, setting.n_rows)
    shutil.rmtree(folder)
    return Timed(wall_s, after.ru_maxrss / 1e6, cpu_s, judge(setting, ids))


def time_read_all(setting: Setting) -> Timed:
    """K jobs read everything and keep one bucket each: the scheme everyone outgrows. One process, rows in NumPy."""
    folder = fresh(setting.folder / "read_all")
    sources = source_files(setting)

    def work() -> Iterator[NDArray[np.uint64]]:
        for bucket in range(setting.fan_out):
            rows, ids = [], []
            for index, source in enumerate(sources, start=1):
                label = stream(0, "read all", index).words(setting.shard_rows) % np.uint64(setting.fan_out)
                chosen = np.flatnonzero(label == bucket)
                rows.append(np.fromfile(source, np.uint8, offset=4096).reshape(setting.shard_rows, setting.row_bytes)[chosen])
                ids.append(chosen.astype(np.uint64) + np.uint64(index << SHARD_SHIFT))
            order = stream(0, "read all bucket", bucket).permutation(sum(map(len, ids)))
            with (folder / str(bucket)).open("wb") as file:
                file.write(np.concatenate(rows)[order].data)
                os.fsync(file.fileno())
            yield np.concatenate(ids)[order]

    return _time_here(setting, work)


def time_buffer(setting: Setting) -> Timed:
    """A mixing buffer in memory, the field's usual way: fill it, shuffle it, emit half, fill it again. One process."""
    folder = fresh(setting.folder / "buffer")
    half = max(1, min(setting.memory_bytes // (4 * setting.row_bytes), setting.n_rows // 8))

    def work() -> Iterator[NDArray[np.uint64]]:
        held, held_ids = np.zeros((0, setting.row_bytes), np.uint8), np.zeros(0, np.uint64)
        bits = stream(0, "buffer")
        with (folder / "rows").open("wb") as file:
            for index, source in enumerate(source_files(setting), start=1):
                for first in range(0, setting.shard_rows, half):
                    n = min(half, setting.shard_rows - first)
                    data = np.fromfile(source, np.uint8, count=n * setting.row_bytes, offset=4096 + first * setting.row_bytes).reshape(n, -1)
                    ids = np.arange(first, first + n, dtype=np.uint64) + np.uint64(index << SHARD_SHIFT)
                    order = bits.permutation(len(held) + n)
                    held, held_ids = np.concatenate([held, data])[order], np.concatenate([held_ids, ids])[order]
                    keep = min(half, len(held))
                    file.write(np.ascontiguousarray(held[keep:]).data)
                    yield held_ids[keep:]
                    held, held_ids = held[:keep], held_ids[:keep]
            file.write(np.ascontiguousarray(held).data)
            os.fsync(file.fileno())
        yield held_ids

    return _time_here(setting, work)


def _time_here(setting: Setting, work: Callable[[], Iterator[NDArray[np.uint64]]]) -> Timed:
    """Time a scheme in this process; it yields row ids in the order in which it wrote them. Its memory is not told from this process's."""
    drop_cache(Path(setting.root) / "2-activations")
    started, cpu = time.perf_counter(), time.process_time()
    ids = list(work())
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    for folder in ("read_all", "buffer"):
        shutil.rmtree(setting.folder / folder, ignore_errors=True)
    return Timed(wall_s, 0.0, cpu_s, judge(setting, np.concatenate(ids)))


def flush(path: Path) -> None:
    """Flush a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
