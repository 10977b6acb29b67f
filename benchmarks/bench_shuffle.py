"""The shuffle beside the sequential-I/O floor, its peers and the schemes it replaces: seconds, memory and mixing, in one run.

    python benchmarks/bench_shuffle.py --quick                          0.4 GB, ends within 45 s on 2 cores
    python benchmarks/bench_shuffle.py                                  4.1 GB of 1-KB rows, all peers: minutes, and 30 GB of disk
    python benchmarks/bench_shuffle.py --gb 16.4 --memory-gb 2 --peers duckdb       larger than memory
    python benchmarks/bench_shuffle.py --gb 1 --s3                      on a real S3 server of its own (SeaweedFS, from the dev extra)

Sketch before code: two passes read and write every byte twice, so the floor is two sequential copies, direct I/O, by the same number of
processes, with fsync. It does not overlap its reads with its writes; we do, and the CPU's share (about 0.7 s a GB and pass on one core)
hides behind the disk, so we may come out below it. Rows that fit one job's memory need one pass only: its rows say so.

Everybody reads the same rows (1 KB of bfloat16 and a row id) cold and writes them shuffled and synced. One JSON line a row:

    name, value, unit      seconds, wall clock, the median of the rounds
    ours                   seconds of this project's shuffle (its best number of processes)
    ratio_to_floor         value / floor of as many passes, the median over the rounds (in each round everybody's best is one after the other)
    ratio_to_best_peer     best peer / value: above 1 is faster than the best peer of the same run
    rss_gb, cpu_s          peak memory of all its processes together; CPU seconds
    mixing                 findings of the certificate's battery that refuse the order (empty: none)

Ratios are of one run on one machine; bare seconds are not to be compared between runs.
"""

import argparse
import mmap
import multiprocessing as mp
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from floors import report
from shuffle_peers import PEERS, has_peer, time_buffer, time_peer, time_read_all
from shuffle_rows import HOOK, Setting, Timed, drop_cache, fresh, judge, make_pipeline, read_shard, source_files, write_parquet, write_shards

from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.mixed import open_mixed, read_mixed_ids
from interp_assets.shuffle.plan import make_shuffle_plan
from interp_assets.shuffle.refs import FOLDER
from interp_assets.shuffle.rows import FIXED_BYTES, SORT_BYTES
from interp_assets.shuffle.split import split_shard
from interp_assets.storage.direct import Workspace
from interp_assets.storage.store import PART_BYTES

SPACE = Workspace()
PIECE = 8 << 20
IMPORTS_BYTES = 400 << 20
"""What a process with the libraries loaded holds before it works."""


class Used(NamedTuple):
    """What a worker process has used so far."""

    process: int
    rss_gb: float
    cpu_s: float


def report_use(_: int = 0) -> Used:
    """Tell what this process has used; the imports are done by then."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Used(os.getpid(), used.ru_maxrss / 1e6, used.ru_utime + used.ru_stime)


def split_one(setting: Setting, index: int) -> Used:
    """Run one split job."""
    split_shard(*make_pipeline(setting), HOOK, index, None, SPACE)
    return report_use()


def gather_one(setting: Setting, bucket: int) -> Used:
    """Run one gather job."""
    gather_bucket(*make_pipeline(setting), HOOK, bucket, None, SPACE)
    return report_use()


def copy_file(source: Path, target: Path) -> Used:
    """Copy a file sequentially with direct I/O through one buffer, and sync it."""
    buffer = memoryview(mmap.mmap(-1, PIECE))
    direct = getattr(os, "O_DIRECT", 0)
    reader, writer = os.open(source, os.O_RDONLY | direct), os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct)
    done, size = 0, source.stat().st_size
    while done < size:
        n = os.preadv(reader, [buffer], done)
        os.pwrite(writer, buffer[: -(-n // 4096) * 4096], done)
        done += n
    os.ftruncate(writer, size)
    os.fsync(writer)
    os.close(reader)
    os.close(writer)
    return report_use()


def copy_object(setting: Setting, index: int) -> Used:
    """Read a shard from the object store and write it back under another name, with the client that the platform uses."""
    pipeline, store = make_pipeline(setting)
    data = memoryview(read_shard(setting, store, pipeline, index))
    with store.open_writer(f"floor/{index}") as sink:
        for start in range(0, len(data), PART_BYTES):
            sink.write(data[start : start + PART_BYTES])
    return report_use()


def time_ours(setting: Setting, pool: ProcessPoolExecutor) -> Timed:
    """Shuffle with this project, jobs spread over the processes of `pool`, and measure the mixing afterwards."""
    pipeline, store = make_pipeline(setting)
    for item in list(store.list(FOLDER)):
        store.delete([item.path])
    make_shuffle_plan(pipeline, store)

    def work() -> list[Used]:
        if setting.passes == 1:
            return [pool.submit(gather_one, setting, 0).result()]
        done = list(pool.map(split_one, [setting] * setting.n_shards, pipeline.train_indices))
        return done + list(pool.map(gather_one, [setting] * setting.fan_out, range(setting.fan_out)))

    timed = time_pool(setting, pool, work)
    shards = open_mixed(pipeline, store, HOOK)
    return timed._replace(mixing=judge(setting, np.concatenate([read_mixed_ids(store, shard, 0, shard.n_rows) for shard in shards])))


def time_floor(setting: Setting, pool: ProcessPoolExecutor) -> Timed:
    """Copy all rows once a pass, in as many files and processes as ours."""
    if setting.root.startswith("s3://"):
        indices = range(1, setting.n_shards + 1)
        return time_pool(setting, pool, lambda: list(pool.map(copy_object, [setting] * setting.n_shards, indices)), times=setting.passes)
    folder, first = fresh(setting.folder / "floor"), source_files(setting)

    def work() -> list[Used]:
        used, sources = [], first
        for stage in range(setting.passes):
            targets = [folder / f"{stage}-{i}" for i in range(len(sources))]
            used += list(pool.map(copy_file, sources, targets))
            sources = targets
        return used

    timed = time_pool(setting, pool, work)
    shutil.rmtree(folder)
    return timed


def time_pool(setting: Setting, pool: ProcessPoolExecutor, work: Callable[[], list[Used]], times: int = 1) -> Timed:
    """Time work that is spread over processes, from cold input; its wall and CPU time count `times`."""
    before = {used.process: used.cpu_s for used in pool.map(report_use, range(16))}
    os.sync()  # what others have left to write would be written in our time
    if not setting.root.startswith("s3://"):
        drop_cache(Path(setting.root) / "2-activations")
    started = time.perf_counter()
    after = work()
    wall_s = time.perf_counter() - started
    processes = {used.process for used in after}
    peaks = [max(used.rss_gb for used in after if used.process == process) for process in processes]
    cpu = [max(used.cpu_s for used in after if used.process == process) - before.get(process, 0.0) for process in processes]
    return Timed(wall_s * times, sum(peaks), sum(cpu) * times, None)


def run_all(setting: Setting, processes: list[int], peers: list[str], rounds: int, *, outgrown: list[str]) -> dict[str, list[Timed]]:
    """Time every contender on the same rows: floor and ours by turns, then the others, once each."""
    is_local = not setting.root.startswith("s3://")
    write_shards(setting)
    found: dict[str, list[Timed]] = {}

    def run(name: str, work: Callable[[], Timed]) -> None:
        found.setdefault(name, []).append(work())
        print(f"# {name}: {found[name][-1].wall_s:.1f} s", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(n, mp.get_context("spawn"))) for n in processes]
        for _ in range(rounds):
            for n, pool in zip(processes, pools, strict=True):
                label = f"{n} process{'es' if n > 1 else ''}"
                run(f"floor: two sequential copies, {label}", lambda pool=pool: time_floor(setting, pool))
                run(f"ours, {label}", lambda pool=pool: time_ours(setting, pool))
            if fits_memory(setting):
                run("one pass floor: one sequential copy", lambda: time_floor(setting._replace(passes=1), pools[0]))
                run("one pass ours, 1 process", lambda: time_ours(setting._replace(passes=1), pools[0]))
    if is_local and "read-all" in outgrown:
        run("outgrown: K jobs read all", lambda: time_read_all(setting))
    if is_local:
        if "buffer" in outgrown:
            run("outgrown: mixing buffer", lambda: time_buffer(setting))
        if peers:
            clear_payload(setting)
            write_parquet(setting)
        for name in peers:
            try:
                run(f"peer: {name}", lambda name=name: time_peer(setting, name))
            except RuntimeError as error:
                print(f"# peer: {name} failed: {error}", file=sys.stderr, flush=True)
    return found


def fits_memory(setting: Setting) -> bool:
    """Return whether one job can hold all rows, so that one pass is enough."""
    return setting.n_rows * (setting.row_bytes + SORT_BYTES) + FIXED_BYTES + IMPORTS_BYTES < setting.memory_bytes


def clear_payload(setting: Setting) -> None:
    """Delete our rows, which the peers do not read: a large benchmark needs the space."""
    for folder in (Path(setting.root) / "2-activations", Path(setting.root) / FOLDER):
        for file in folder.rglob("rows.*"):
            file.unlink()


def print_rows(found: dict[str, list[Timed]], setting: Setting) -> None:
    """Print one JSON object a line."""
    floors = [
        min(turn, key=lambda timed: timed.wall_s) for turn in zip(*(runs for name, runs in found.items() if name.startswith("floor")), strict=True)
    ]
    typical = {name: statistics.median(timed.wall_s for timed in runs) for name, runs in found.items()}

    def best(prefix: str) -> float | None:
        return min((wall_s for name, wall_s in typical.items() if name.startswith(prefix)), default=None)

    ours, peer = min(filter(None, (best("ours"), best("one pass ours")))), best("peer")
    config = {
        "gb": round(setting.gigabytes, 3),
        "row_bytes": setting.row_bytes,
        "shards": setting.n_shards,
        "fan_out": setting.fan_out,
        "passes": 2,  # but in rows that say one pass
        "memory_gb": setting.memory_bytes / 1e9,
        "store": setting.root.partition("://")[0] if "://" in setting.root else "local disk",
    }
    for name, runs in found.items():
        beside = found["one pass floor: one sequential copy"] if name.startswith("one pass") else floors
        ratios = [timed.wall_s / floor.wall_s for timed, floor in zip(runs, beside, strict=False)]
        row: dict[str, Any] = {
            "name": name,
            "value": round(typical[name], 3),
            "unit": "s",
            "ours": None if ours is None else round(ours, 3),
            "ratio_to_floor": round(statistics.median(ratios), 3),
            "ratio_to_best_peer": None if peer is None else round(peer / typical[name], 3),
            "rounds": [round(timed.wall_s, 3) for timed in runs],
            "rss_gb": round(max(timed.rss_gb for timed in runs), 3),
            "cpu_s": round(statistics.median(timed.cpu_s for timed in runs), 3),
            "mixing": runs[-1].mixing,
            "config": config,
        }
        report(row)


def make_setting(options: argparse.Namespace, folder: Path, root: str) -> Setting:
    """Cut the rows into shards and buckets that fit the memory when as many processes as asked for work at once."""
    n_rows, memory = int(options.gb * 1e9) // options.row_bytes, int(options.memory_gb * 1e9)
    job_bytes = memory // max(options.processes) - FIXED_BYTES - IMPORTS_BYTES
    n_jobs = max(8, -(-n_rows * (options.row_bytes + 8 + SORT_BYTES) // max(1, job_bytes)))
    return Setting(folder, root, n_jobs, n_rows // n_jobs, options.row_bytes // 2, n_jobs, memory)


def main() -> None:
    """Run all contenders and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.4 GB, the fast peers only")
    parser.add_argument("--gb", type=float, default=4.1, help="GB of rows")
    parser.add_argument("--row-bytes", type=int, default=1024, help="bytes of a row, a multiple of 8")
    parser.add_argument("--memory-gb", type=float, default=3.0, help="memory of all our processes together, and DuckDB's limit")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to run floor and ours with")
    parser.add_argument("--peers", nargs="*", default=["duckdb", "polars", "datasets", "gnu-shuf"], choices=PEERS)
    parser.add_argument("--no-outgrown", action="store_true", help="leave the outgrown schemes out: K jobs that read all take K times the reads")
    parser.add_argument("--rounds", type=int, default=3, help="how often floor and ours take turns")
    parser.add_argument("--s3", action="store_true", help="keep our artifacts on a real S3 server, started for this run")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    if options.quick:
        options.gb, options.peers, options.rounds = 0.4, ["duckdb", "polars"], 2
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-shuffle-")))
        root = str(fresh(folder / "ours"))
        if options.s3:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
            from s3_server import start_s3_server  # noqa: PLC0415 - only where it is asked for

            server = start_s3_server(folder / "s3")
            stack.callback(server.stop)
            os.environ.update(server.environment)
            root = "s3://test/bench"
        setting = make_setting(options, folder, root)
        peers = [name for name in options.peers if has_peer(name)]
        outgrown = [] if options.no_outgrown else ["buffer"] if options.quick else ["read-all", "buffer"]
        print_rows(run_all(setting, options.processes, peers, options.rounds, outgrown=outgrown), setting)


if __name__ == "__main__":
    main()
