"""Compiling takes minutes at first use: a training in processes of its own says so, and no rate is made of that time."""

import json
import runpy
import sys
from pathlib import Path

from interp_assets.compute.compiled import Compiling, compiled, n_compilations, observe_compiling, tell_compiling
from interp_assets.train.launch import _listen, start_group


def test_each_loop_that_is_compiled_is_told(tmp_path: Path) -> None:
    """Rank 0 hands this on to its launcher, line by line. The loop lies in a file of its own: what was compiled once is kept with its file."""
    (tmp_path / "fresh.py").write_text("def double(x):\n    return 2 * x\n")
    double = runpy.run_path(str(tmp_path / "fresh.py"))["double"]
    told: list[Compiling] = []
    tell_compiling(told.append)
    try:
        assert compiled(double)(3) == 6
    finally:
        tell_compiling(str)
    assert [found.is_busy for found in told] == [True, False]
    assert told[1].took_s > told[0].took_s
    assert told[1].n == told[0].n == n_compilations()


def test_a_launcher_knows_what_its_processes_compile() -> None:
    """Under torchrun a training stood still without a word, and its time became the machine's rate."""
    events = [
        {"event": "compiling", "is_busy": True, "took_s": 2.5, "n": 7},
        {"event": "progress", "n": 1},
        {"event": "compiling", "is_busy": False, "took_s": 40.0, "n": 8},
        {"event": "progress", "n": 2},
        {"event": "compiling", "is_busy": True, "took_s": 41.0, "n": 9},
    ]
    lines = "\n".join(json.dumps(event) for event in events)
    before, seen = observe_compiling(), []
    with start_group([sys.executable, "-c", f"print({lines!r})"], {}) as (process, _):
        assert _listen(process, lambda n: seen.append((n, observe_compiling())), None, print) is None
    assert seen == [
        (1, Compiling(is_busy=True, took_s=before.took_s + 2.5, n=before.n + 7)),
        (2, Compiling(is_busy=False, took_s=before.took_s + 40.0, n=before.n + 8)),
    ]
    assert observe_compiling() == Compiling(is_busy=False, took_s=before.took_s + 41.0, n=before.n + 9)
    assert n_compilations() == before.n + 9
