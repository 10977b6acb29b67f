"""What it takes to try an idea: from a saved file to a curve, twelve arms, their table, and what they differ in.

    make bench-experiments QUICK=1      planted rows, no model: half a minute
    make bench-experiments              the shipped model on the standard library: minutes

One JSON line a figure, each with its goal. Commands are those that people type, in processes of
their own.

    1  p_anneal, by autograd: its lines, the seconds of `interp check`, a step beside the built-in one of its kind
    2  CPU seconds from a saved file to the first point of its curve, by a process that starts anew; `interp try` of 12 arms x 100,000 rows
    3  lines of 12 arms; what they took over what was forecast, by a plan that has seen this machine once; evaluation over training
    6  a table of 10,000 arms, without torch
    7  arms of which one thing differs: how many of the causes that `interp diff` names are that one thing
    9  numbers of the comparison that say of how many trainings they are

That the others are bit for bit what they are without a stopped or failed arm, and that a new field changes no id (goals 4 and 5), tests hold:
tests/train/results/test_stopping.py, tests/train/test_train_loop.py, tests/planning/test_identity.py.
"""

import argparse
import csv
import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from floors import report as share

from interp_assets.planning.config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
INTERP = [sys.executable, "-c", "from interp_assets.terminal.cli import main; main()"]
P_ANNEAL = """import torch
from interp_assets.lab import Terms, architecture


@architecture(kind="relu")
def p_anneal(w, x, y, step, *, p_end: float = 0.5):
    p = 1 + (p_end - 1) * max(0.0, (step.progress - 0.3) / 0.7)
    f = torch.relu(x @ w["W_enc_T"].T + w["b_enc"])
    penalty = (f * step.norms(w)).clamp(min=1e-6).pow(p).mul(f > 0).sum(1).mean()
    return Terms(f @ w["W_dec"] + w["b_dec"], latents=f, penalty=step.coefficient * penalty)
"""
ARMS = """saes:
  - {{name: a, architecture: batch_topk, {sizes},
     each: {{k: [8, 16, 32], learning_rate: [0.001, 0.002], seed: {{count: 2}}}}}}
features: {{saes: []}}
"""
"""Twelve arms; the last line is no part of them."""
PLANTED = """corpus: {source: planted, features: 512, width: 64, n_rows: 147456, rows_per_shard: 16384}
"""
TEXT = """corpus: {source: stdlib, max_shards: 4}
"""
SIZES = {True: "d_sae: 512, batch_rows: 1024, n_rows: 20000", False: "d_sae: 2048, batch_rows: 2048, n_rows: 100000"}
FIRST_POINT = """
import sys, time
from interp_assets.planning.config import load_config
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.terminal.trying import try_saes

def stop(metrics):
    print(time.process_time())
    sys.exit(0)

config = load_config(sys.argv[1])
store = open_pipeline_store(config)
try_saes(load_pipeline(config, store), store, 100_000, stop)
"""
TABLE = """
import sys, time
from interp_assets import lab
table = lab.open(sys.argv[1]).table()
print(table.height, time.process_time(), "torch" in sys.modules)
"""


class Took(NamedTuple):
    """What a command said and took."""

    said: str
    wall_s: float
    cpu_s: float


def call(words: list[str], folder: Path, *, may_fail: bool = False) -> Took:
    """Run a command in a folder. Raises `RuntimeError` with what it said where it fails."""
    before, began = _cpu_s(), time.monotonic()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})
    if done.returncode and not may_fail:
        message = f"{' '.join(words[3:])} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        raise RuntimeError(message)
    return Took(done.stdout, time.monotonic() - began, _cpu_s() - before)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(goal: int, name: str, value: float, unit: str, at_most: float | None, **more: Any) -> None:
    """Print a figure beside its goal."""
    line = {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "ours": True,
        "ratio_to_floor": None,
        "ratio_to_best_peer": None,
        "goal": {"number": goal, "at_most": at_most, "is_met": at_most is None or value <= at_most},
    }
    share(line | {key: round(item, 3) if isinstance(item, float) else item for key, item in more.items()})


def measure_architecture(folder: Path) -> None:
    """Goal 1: p-anneal is one file; it is checked, and a step of it is timed."""
    (folder / "my_sae.py").write_text(P_ANNEAL)
    report(1, "p_anneal", P_ANNEAL.partition("\n\n\n")[2].count("\n"), "lines", 8, files=1, edits=0)
    checked = call([*INTERP, "check", "my_sae.py:p_anneal"], folder)
    report(1, "interp check", checked.wall_s, "s", 20, cpu_s=checked.cpu_s)
    (ratio,) = re.findall(r"([\d.]+) times the CPU of a step of relu", checked.said)
    report(1, "a step of p_anneal beside relu's", float(ratio), "times", 2)


def measure_tries(folder: Path, *, is_quick: bool) -> None:
    """Goal 2: the first point of a curve, and twelve arms."""
    call([*INTERP, "run", "--config", "p.yaml", "--select", "+shuffle_certificate", "--select", "+activation_statistics"], folder)
    own = (folder / "p.yaml").read_text().partition("saes:")[0]
    own += "saes: [{name: own, architecture: my_sae.py:p_anneal, d_sae: 2048, batch_rows: 2048}]\nfeatures: {saes: []}\n"
    (folder / "own.yaml").write_text(own)
    call([sys.executable, "-c", FIRST_POINT, "own.yaml"], folder)  # compiled loops are kept on the disk
    first = call([sys.executable, "-c", FIRST_POINT, "own.yaml"], folder)
    report(2, "saved file to first point", float(first.said.split()[-1]), "CPU s", 5)
    n_rows = 20_000 if is_quick else 100_000
    tried = call([*INTERP, "try", "--config", "p.yaml", "--rows", str(n_rows)], folder)
    report(2, f"interp try of 12 arms x {n_rows:,} rows", tried.wall_s, "s", 60, cpu_s=tried.cpu_s)


def measure_sweep(folder: Path) -> None:
    """Goals 3, 7 and 9: twelve arms are trained and measured; what they took, what they differ in, and what is said of how many they are."""
    arms = ARMS.partition("features:")[0]
    report(3, "12 arms", arms.count("\n"), "lines", 6)
    call([*INTERP, "run", "--config", "p.yaml", "--select", "+sweep", "--set", "saes.*.seed=7"], folder)  # rates of this machine, once
    call([*INTERP, "run", "--config", "p.yaml", "--select", "+sweep"], folder)
    (path,) = sorted((folder / "data" / "bench" / ".history").glob("*.json"))[-1:]
    assets = {item["name"]: item for item in json.loads(path.read_text())["assets"]}
    train, evaluate = assets["sae"], assets["sae_evaluation"]
    took, expected = (sum(item[name] for item in (train, evaluate)) for name in ("seconds", "forecast_s"))
    report(3, "forecast of trainings and evaluations", abs(took / expected - 1), "of the forecast", 0.3, took_s=took, forecast_s=expected)
    report(3, "evaluation beside training", evaluate["seconds"] / train["seconds"], "times", 1, seconds=evaluate["seconds"])
    names = [sae.name for sae in load_config(folder / "p.yaml").saes]
    differences = {"seed": names[:2], "learning_rate": names[0:3:2], "k": names[0:5:4]}
    for field, pair in differences.items():
        said = call([*INTERP, "diff", *pair, "--config", "p.yaml"], folder).said
        causes = [line.strip() for line in said.partition("They differ in\n")[2].partition("\n\n")[0].splitlines()]
        wrong = [line for line in causes if field not in line and "name" not in line]
        report(7, f"interp diff of two arms that differ in {field}", len(wrong) + (not causes), "causes that are none", 0, causes=causes)
    table = call([*INTERP, "sweep", "--config", "p.yaml", "--csv"], folder).said
    counts = [line["n"] for line in csv.DictReader(io.StringIO(table))]
    report(9, "recipes whose number of trainings is not said", sum(count != "2" for count in counts), "of 6", 0, n=counts)


def measure_table(folder: Path, n: int) -> None:
    """Goal 6: ten thousand arms in one table."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
    from synthetic_sweep import build_synthetic_sweep  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - tests/support is no package

    from interp_assets.storage.store import open_store  # noqa: PLC0415 - seconds

    build_synthetic_sweep(open_store(str(folder / "many")), ks=tuple(range(1, 100)), n_seeds=n // 200, n_steps=2)
    call([sys.executable, "-c", TABLE, "many"], folder)
    found = call([sys.executable, "-c", TABLE, "many"], folder)
    height, cpu_s, has_torch = found.said.split()
    report(6, f"table of {int(height):,} arms", float(cpu_s), "CPU s", 2, wall_s=found.wall_s, loads_torch=has_torch == "True")


def main() -> None:
    """Measure all of it in a folder that is deleted again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="planted rows, small SAEs")
    parser.add_argument("--arms", type=int, default=10_000, help="of the large table")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        head = "name: bench\nroot: data\n" + (PLANTED if chosen.quick else TEXT)
        (folder / "p.yaml").write_text(head + ARMS.format(sizes=SIZES[chosen.quick]))
        measure_architecture(folder)
        measure_tries(folder, is_quick=chosen.quick)
        measure_sweep(folder)
        measure_table(folder, 1000 if chosen.quick else chosen.arms)


if __name__ == "__main__":
    main()
