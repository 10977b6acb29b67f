"""SAEs to train become one training, in this process or in several that torchrun starts, with the same callbacks and results.

`execution.processes` decides. The processes find the same configuration in a temporary file and the plan in the store; rank 0's JSON
lines (`__main__.py`) come back as progress, metrics and errors. They run in a process group of their own, which ends with this call,
whatever happens: an interrupted run leaves no worker behind. One that is killed without a word (SIGKILL) leaves none either: it holds the
other end of their standard input, and they end when that closes. Their standard error is passed on as it comes; when one of them dies,
torchrun ends the others, and its last words there say which one it was and of what.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from interp_assets import errors
from interp_assets.compute.compiled import Compiling, hear_compiling
from interp_assets.errors import ConfigError, InterpError, OwnCodeError, StoppedError, StoreError
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.storage.traffic import METER, Traffic
from interp_assets.train.exchange.imported import import_sae
from interp_assets.train.loop import OnFailure, OnMetrics, TrainingMetrics, find_trained, train_saes
from interp_assets.train.own.load import keep_code
from interp_assets.train.parallel import Ranks, check_grid
from interp_assets.train.refs import LogRow, sae_ref
from interp_assets.train.results.ended import FAILED, STOPPED, save_ended

_GRACE_S: Final = 10.0
ATTACHED: Final = "INTERP_TRAINING_ATTACHED"
"""Environment variable that tells training processes to end when their standard input does."""
SAFE_PATH: Final = {"PYTHONSAFEPATH": "1"}
"""Environment of every Python that we start: a file of the current directory is no module."""
_KEPT_LINES: Final = 400
_SUMMARY: Final = re.compile(r"^\s*rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+) \(pid: (\d+)\)", re.MULTILINE)
"""A process in torchrun's summary of failures; the last one is the first that it saw fail."""
_logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What became of SAEs that were to be trained."""

    made: dict[str, Produced]
    failed: dict[str, InterpError]

    def take(self, name: str) -> Produced:
        """Return an SAE. Raises what kept it from being one."""
        if name in self.failed:
            raise self.failed[name]
        return self.made[name]


def run_training(pipeline: Pipeline, store: Store, names: Sequence[str], progress: Advance = unheard, on_metrics: OnMetrics | None = None) -> Trained:
    """Train the named SAEs with as many processes as `execution.processes` says; they inherit the environment, and so the credentials.

    Imported ones are read from their folders instead. One that cannot be trained or read keeps no other from it: its error is returned. Raises
    what would stop them all: `ConfigError` when the processes can't be arranged as configured, `StoreError`, the death of a process.
    """
    failed: dict[str, InterpError] = {}
    imported: dict[str, Produced] = {}
    logs: dict[str, list[LogRow]] = {}

    def hear(metrics: TrainingMetrics) -> None:
        logs.setdefault(metrics.name, []).append(metrics.row)
        if on_metrics is not None:
            on_metrics(metrics)

    def drop(name: str, error: InterpError) -> None:
        failed.setdefault(name, error)
        is_stopped = isinstance(error, StoppedError)
        if logs.get(name) or not is_stopped:  # one that was stopped in an earlier run has its record
            save_ended(store, sae_ref(pipeline, name), name, logs.get(name, []), status=STOPPED if is_stopped else FAILED, why=str(error))

    for name in names:
        if pipeline.config.sae(name).imported:
            try:
                imported[name] = import_sae(pipeline, store, name)
            except StoreError:
                raise
            except InterpError as error:
                drop(name, error)
    trained = [name for name in names if not pipeline.config.sae(name).imported]
    made = imported | (_train(pipeline, store, trained, (progress, hear, drop)) if trained else {})
    return Trained({name: made[name] for name in names if name in made}, failed)


def _train(pipeline: Pipeline, store: Store, names: Sequence[str], hears: tuple[Advance, OnMetrics | None, OnFailure]) -> dict[str, Produced]:
    n_processes, (progress, on_metrics, on_failure) = pipeline.config.execution.processes, hears
    check_processes(pipeline, names)
    if n_processes == 1:
        return train_saes(pipeline, store, names, progress, on_metrics, on_failure=on_failure)
    names = [name for name in names if _can_keep(pipeline, store, name, on_failure)]
    if not names:
        return {}
    started_s = time.perf_counter()
    cached = {name for name in names if find_trained(pipeline, store, name) is not None}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "pipeline.json"
        config.write_text(pipeline.config.model_dump_json(), encoding="utf-8")
        with start_group(*_command(config, names, n_processes)) as (process, last_words):
            failure = _listen(process, *hears)
            status = process.wait()
            last_words.thread.join(_GRACE_S)
    if failure is not None:
        raise failure
    if status:
        raise InterpError(explain_death(last_words.text(), status))
    wall_s = time.perf_counter() - started_s
    found = {name: find_trained(pipeline, store, name) for name in names}
    return {
        name: Produced(sae_ref(pipeline, name), manifest, name in cached, 0.0 if name in cached else wall_s)
        for name, manifest in found.items()
        if manifest is not None
    }


def _can_keep(pipeline: Pipeline, store: Store, name: str, on_failure: OnFailure) -> bool:
    """Publish the file of an SAE's own architecture, which the processes execute; tell of one that is lost."""
    try:
        keep_code(store, pipeline.config.sae(name).code, pipeline.config.sae(name).architecture)
    except OwnCodeError as error:
        on_failure(name, error)
        return False
    return True


def check_processes(pipeline: Pipeline, names: Sequence[str]) -> None:
    """Say what divides before any process starts. Raises `ConfigError`."""
    n_processes, n_slices = pipeline.config.execution.processes, pipeline.config.execution.latent_processes
    check_grid(n_processes, n_slices)
    if n_processes > 1 and pipeline.config.root.startswith("memory://"):
        raise ConfigError(f"{pipeline.config.root} is this process' memory: several training processes need a folder or a bucket. Set `root`.")
    ranks = Ranks(0, n_processes, n_slices)
    for config in (pipeline.config.sae(name) for name in names):
        ranks.share(config.batch_rows)
        if config.is_own and n_slices > 1:
            raise ConfigError(
                f"SAE {config.name!r} has an architecture of your own, whose latents are not divided. Set execution.latent_processes to 1."
            )
        ranks.latents(config.d_sae)


def _command(config: Path, names: Sequence[str], n_processes: int) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment of the training processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    threads = max(1, (os.cpu_count() or 1) // n_processes)
    variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **os.environ, **SAFE_PATH, ATTACHED: "1"}
    return [*command, "-m", "interp_assets.train", str(config), *names], variables


class LastWords(NamedTuple):
    """The end of what processes wrote to standard error."""

    lines: deque[str]
    thread: threading.Thread
    """Reads on until the last process that holds the pipe is gone, which may be after the one that was started."""

    def text(self) -> str:
        """Return what was read so far."""
        return "".join(self.lines.copy())


@contextmanager
def start_group(command: Sequence[str], variables: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[str], LastWords]]:
    """Start a command in a process group of its own, and end the whole group when the block ends; its standard input ends with this process."""
    process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=variables,
        start_new_session=True,
    )
    last_words = _pass_on(process)
    try:
        yield process, last_words
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _pass_on(process: subprocess.Popen[str]) -> LastWords:
    """Write the processes' standard error to this one's, as it comes, and keep its end; the thread that reads it closes it."""
    lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def read() -> None:
        assert process.stderr is not None
        with process.stderr as stream:
            for line in stream:
                lines.append(line)
                sys.stderr.write(line)

    thread = threading.Thread(target=read, name="standard error of training", daemon=True)
    thread.start()
    return LastWords(lines, thread)


def explain_death(last_words: str, status: int) -> str:
    """Say which training process died first, and of what, from the summary that torchrun leaves.

    Processes that torchrun ended because of the first one are not named; nor, when one was killed, those that failed because their peer was gone.
    """
    found = [(int(rank), int(code), int(pid)) for rank, code, pid in _SUMMARY.findall(last_words)]
    killed = [item for item in found if item[1] < 0 and item[1] != -signal.SIGTERM]
    again = "Materialize again: training goes on from its last checkpoint."
    if killed:
        rank, code, pid = killed[0]
        name = _signal_name(-code)
        memory = ""
        if -code == signal.SIGKILL:
            memory = " The system does that when memory runs out: lower batch_rows or d_sae, or train fewer SAEs in one run."
        return f"The training process of rank {rank} (pid {pid}) was killed by {name}, and the others were ended.{memory} {again}"
    if found:
        rank, code, pid = found[-1]
        return f"The training process of rank {rank} (pid {pid}) ended with status {code}; its message is above, in the log's standard error. {again}"
    return f"The training processes ended with status {status}; their messages are above, in the log's standard error. {again}"


def _signal_name(number: int) -> str:
    """Name a signal; those of real time have no name in Python."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _listen(process: subprocess.Popen[str], progress: Advance, on_metrics: OnMetrics | None, on_failure: OnFailure) -> InterpError | None:
    """Hand rank 0's lines on until all have closed their output, and count every rank's traffic; return the first error that was reported."""
    failure: InterpError | None = None
    hear, heard = hear_compiling(), Compiling(is_busy=False, took_s=0.0)
    for line in process.stdout or ():
        event = _parse(line)
        match event.get("event"):
            case "progress":
                progress(event["n"])
            case "metrics" if on_metrics is not None:
                on_metrics(TrainingMetrics(event["name"], LogRow(**event["row"]), event["n_steps"], event["rows_per_s"], event["input_wait_share"]))
            case "compiling":
                heard = Compiling(event["is_busy"], event["took_s"], event["n"])
                hear(heard)
            case "traffic":
                METER.add(Traffic(event["gets"], event["puts"], event["read_bytes"], event["written_bytes"]))
            case "failed":
                on_failure(event["name"], _make_error(event))
            case "error" if failure is None:
                failure = _make_error(event)
            case None:
                _logger.info("training: %s", line.rstrip())
    hear(heard._replace(is_busy=False))
    return failure


def _make_error(event: Mapping[str, Any]) -> InterpError:
    kind = getattr(errors, event["type"], InterpError)
    return kind(event["message"])


def _parse(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
