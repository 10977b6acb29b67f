"""Peers as child processes in an environment of their own: one JSON line is a request, one line is its answer. Needs the standard library alone.

A child reads `{"make": {...}}` and answers `{"made": true}`, or false and because of what; then `{"run": true}` does the work once and answers what
that took: wall seconds, CPU seconds of all threads, and the most memory that the process ever had.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Run = Callable[[], object]


class Child:
    """A process that answers."""

    def __init__(self, python: str, script: str, *arguments: str) -> None:
        """Start a script of this folder with another interpreter, which must not see this environment's packages."""
        command = [python, str(Path(__file__).with_name(script)), *arguments]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one line and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        ended = '{"made": false, "because": "the peer ended", "seconds": Infinity, "cpu_s": Infinity, "rss_gb": Infinity}'
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return json.loads(ended)
        return json.loads(self._process.stdout.readline() or ended)

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextmanager
def open_children(python: str, script: str, names: tuple[str, ...], *arguments: str) -> Iterator[list[tuple[str, Child]]]:
    """Start one child for each peer; none, with a line that says so, without an interpreter."""
    if not python:
        sys.stderr.write("No peers: name an interpreter that has them with --peers or BENCH_PEERS (benchmarks/README.md says how to make one).\n")
    children = [(name, Child(python, script, *arguments)) for name in (names if python else ())]
    try:
        yield children
    finally:
        for _, child in children:
            child.end()


def measured(run: Run) -> dict[str, float]:
    """Do work and return what it took."""
    begun, cpu = time.perf_counter(), time.process_time()
    run()
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    return {"seconds": seconds, "cpu_s": cpu_s, "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def serve(make: Callable[[dict[str, Any]], Run]) -> None:
    """Be the child: answer lines until the input ends. `make` is given a request and returns the work; the work is done once to warm up."""
    warnings.simplefilter("ignore")
    run: Run = time.time
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            found: dict[str, Any] = {"made": True}
            if "make" in request:
                try:
                    run = make(request["make"])
                    if request["make"].get("is_warmed", True):
                        run()
                except KeyError as error:
                    found = {"made": False, "because": f"it has no {error}"}
                except Exception as error:  # noqa: BLE001 - a peer that fails must not end the run of the others
                    found = {"made": False, "because": f"{type(error).__name__}: {error}"[:300]}
            else:
                found = measured(run)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
