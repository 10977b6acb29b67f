"""Training steps of every architecture beside the bare matrix products they need and beside other tools' steps, in one run.

    make bench-train QUICK=1                                                              small: ends within 45 s on 2 cores
    make bench-train BENCH_ARGS="--peers .peers/bin/python"                               the sizes of the goals, with peers: minutes
    python benchmarks/bench_train.py --architectures relu --d-sae 4096 --append results.jsonl       one of them: a short run
    python benchmarks/bench_train.py --d-sae 4096 --trained states/                       whole trainings, see `train_states.py`
    python benchmarks/bench_train.py --device cuda                                        on a GPU, see `train_gpu.py` for its options

Peers are no dependencies: they live in an environment of their own, and one that is not installed is skipped and named.

    python -m venv .peers && .peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0
    .peers/bin/pip uninstall -y torchvision        where it does not fit torch's build for CPUs: the peers import it if it is there, and fail

`--peers` (or the variable BENCH_PEERS) names its interpreter; `train_peers.py` runs there and is asked for one step at a time, so that
ours, the floor and the peers alternate and a busy machine slows all of them.

Sketch before code: with B rows, n = d_in and m = d_sae, a dense step is five products of 2 B n m operations each (encode, decode, and
the gradients of latents, encoder and decoder); that is the floor, also of Gated, which needs seven when its gates are wide open. They are float32
and made by the library that is the fastest on this kind of CPU (`interp_assets/compute/products.py`), whatever type our step's products are in. A
TopK-like step has to know which k of m latents are active, by one product, and touches only those otherwise. That product is of 8-bit digits where
they are fast (`compute/coarse.py`): a quarter of a float32 one on a Zen 5, 0.05 of the floor, plus scans and the pairs. A step
of ours is the whole of `Trainer.train_step`: loss, gradients, clip, Adam, dead counters, log. One JSON line a case:

    name, value, unit      rows per second
    ours, floor            seconds of a step of ours, and of the five products
    ratio_to_floor         ours / floor: times the floor
    ratio_to_torch_floor   ours / the same products as torch multiplies unless told otherwise, which is what peers have, in `torch_floor` seconds
    ratio_to_best_peer     rows per second of ours / of the fastest peer that has the architecture; null without one
    peers                  times the floor of each peer, or why it has none
    ratio_to_sae_lens      the same against SAELens alone
    state                  `start`: initial weights; `sparse`: biases lowered so that few latents fire, as after the start of a training;
                           `dead`: an eighth of all latents dead, so that AuxK works (TopK family); `training`: the mean over the steps of
                           a real training, from the states it passed through, given in `states` as step: times the floor

OpenMP's idle threads sleep here, as under our command line: the floor and the peers, one thread pool each, don't mind.

Ratios are of one run on one machine; bare rates are not to be compared between runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import torch
from floors import by_torchs_choice, report
from safetensors import safe_open
from train_gpu import main as measure_gpu
from train_states import Planted, make_config

from interp_assets.compute.products import use_fastest_products
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import Architecture
from interp_assets.train.recipes import RECIPES, make_weights
from interp_assets.train.trainer import Trainer

PEERS = ("sae_lens", "sparsify", "dictionary_learning")
SHIFTS: dict[Architecture, float] = {"relu": 0.22, "gated": 2.2, "jump_relu_step": 2.2}
"""By how much biases are lowered so that about 60 of 4,096 latents fire."""
Run = Callable[[], float]


def timed(run: Callable[[], object]) -> Run:
    """Return a function that runs and returns the seconds."""

    def measure() -> float:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun

    return measure


def make_floor(x: torch.Tensor, d_sae: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return the five products of a dense step, into tensors that are there already."""
    x = x.to(dtype)
    W = torch.randn(d_sae, x.shape[1], dtype=dtype)
    latents, x_hat, gradient = torch.empty(len(x), d_sae, dtype=dtype), torch.empty_like(x), torch.empty_like(W)

    def run() -> None:
        torch.mm(x, W.T, out=latents)
        torch.mm(latents, W, out=x_hat)
        torch.mm(x, W.T, out=latents)
        torch.mm(latents.T, x, out=gradient)
        torch.mm(latents.T, x, out=gradient)

    return run


def make_floors(x: torch.Tensor, d_sae: int) -> dict[str, Run]:
    """Return the products by the fastest library, and those by torch's own choice where that is another."""
    floors = {"floor": timed(make_floor(x, d_sae, torch.float32))}
    if use_fastest_products():
        floors["torch_floor"] = by_torchs_choice(timed(make_floor(x, d_sae, torch.float32)))
    return floors


def make_step(architecture: Architecture, x: torch.Tensor, d_sae: int, k: int, state: str, dtype: str) -> Callable[[], object]:
    """Return one training step of an SAE whose latents stay dead or alive as they are."""
    n_rows = 1_000_000 * len(x)
    sizes = {"d_sae": d_sae, "k": k, "batch_rows": len(x), "n_rows": n_rows, "dead_after_rows": 1 << 60}
    config = SaeConfig.model_validate({"architecture": architecture, "product_dtype": dtype, **sizes})
    generator = torch.Generator().manual_seed(0)
    weights = make_weights(config, x, x.shape[1], generator)
    if state == "sparse":
        weights["b_enc"] = weights["b_enc"] - SHIFTS[architecture]
    trainer = Trainer(config, weights, x.device)
    dead = torch.rand(d_sae, generator=generator) < (1 / 8 if state == "dead" else 0)

    def run() -> None:
        trainer.rows_since_fired[dead] = 1 << 60
        trainer.train_step(x)

    return run


def load_states(folder: Path, architecture: Architecture, x: torch.Tensor, d_sae: int, k: int, dtype: str) -> dict[int, Callable[[], object]]:
    """Return one training step from each saved state of a training, by the step it was saved before; the last is that after its end."""
    runs: dict[int, Callable[[], object]] = {}
    for path in sorted(folder.glob(f"{architecture}_{d_sae}_*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        n_steps = int(metadata["n_steps"])
        config = make_config(architecture, d_sae=d_sae, k=k, batch_rows=len(x), n_steps=n_steps, product_dtype=dtype)
        weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
        runs[int(metadata["step"])] = make_run(Trainer(config, weights, x.device), min(int(metadata["step"]), n_steps - 1), tensors["is_dead"], x)
    if not runs:
        raise SystemExit(f"{folder} has no states of {architecture} with {d_sae} latents. Make them with benchmarks/train_states.py.")
    return runs


def make_run(trainer: Trainer, step: int, is_dead: torch.Tensor, x: torch.Tensor) -> Callable[[], None]:
    """Return one step from a state that stays as it is, but for what so few steps change."""

    def run() -> None:
        trainer.step = step
        trainer.rows_since_fired[is_dead] = 1 << 60
        trainer.train_step(x)

    return run


class Peers:
    """The child process that runs other tools' steps."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Talk to a started process."""
        self._process = process

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one line and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline() or '{"made": false, "because": "the peers ended", "seconds": Infinity}')

    def make(self, peer: str, architecture: str, x: torch.Tensor, d_sae: int, k: int) -> Run | str:
        """Return a measured step, or why there is none."""
        found = self.ask(make={"peer": peer, "architecture": architecture, "d_in": x.shape[1], "d_sae": d_sae, "batch_rows": len(x), "k": k})
        return (lambda: float(self.ask(run=True)["seconds"])) if found["made"] else str(found["because"])


@contextmanager
def open_peers(python: str) -> Iterator[list[tuple[str, Peers]]]:
    """Start one child for each peer; none without an interpreter."""
    processes = []
    for peer in PEERS if python else ():
        command = [python, str(Path(__file__).with_name("train_peers.py")), str(torch.get_num_threads())]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        processes.append(
            (peer, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment))
        )
    try:
        yield [(peer, Peers(process)) for peer, process in processes]
    finally:
        for _, process in processes:
            process.kill()
            process.wait()


def time_together(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Return the fastest time of each, taken in turns for about `seconds` and at least twice."""
    best = {name: run() for name, run in runs.items()}
    started, n = time.perf_counter(), 0
    while n < 2 or time.perf_counter() - started < seconds:
        for name, run in runs.items():
            best[name] = min(best[name], run())
        n += 1
    return best


def measure_training(
    chosen: argparse.Namespace, d_sae: int, architecture: Architecture, dtype: str, peers: list[tuple[str, Peers]]
) -> dict[str, Any]:
    """Measure the states of a training, and weigh each by the steps it stands for.

    Peers are timed beside the first state only, and compared with the mean of ours over all: exact for those whose steps take the same
    time whatever fires, as steps of dense products do; peers that become faster or slower in a training are not followed.
    """
    x = Planted(chosen.d_in, 2 * chosen.batch_rows).rows[: chosen.batch_rows].clone()
    found, best_peers, floors, torch_floors = {}, {}, [], []
    for step, run in load_states(Path(chosen.trained), architecture, x, d_sae, chosen.k, dtype).items():
        runs = make_floors(x, d_sae) | {"ours": timed(run)}
        if not found:
            made = {peer: child.make(peer, architecture, x, d_sae, chosen.k) for peer, child in peers}
            runs |= {peer: step_of for peer, step_of in made.items() if not isinstance(step_of, str)}
        best = time_together(runs, chosen.seconds)
        found[step] = best["ours"] / best["floor"]
        floors.append(best["floor"])
        torch_floors.append(best.get("torch_floor", best["floor"]))
        best_peers |= {peer: best[peer] / best["floor"] for peer in best if peer in PEERS}
    steps = sorted(found)
    area = sum((found[low] + found[high]) / 2 * (high - low) for low, high in pairwise(steps))
    mean, floor, torch_floor = area / (steps[-1] - steps[0]), min(floors), min(torch_floors)
    return {
        "name": f"train_{architecture}_training",
        "value": round(len(x) / (mean * floor)),
        "unit": "rows/s",
        "ours": round(mean * floor, 5),
        "floor": round(floor, 5),
        "torch_floor": round(torch_floor, 5),
        "ratio_to_floor": round(mean, 3),
        "ratio_to_torch_floor": round(mean * floor / torch_floor, 3),
        **compare(mean, best_peers),
        "peers": {peer: round(value, 3) for peer, value in best_peers.items()} or None,
        "state": "training",
        "states": {str(step): round(value, 3) for step, value in found.items()},
        "config": describe(chosen, d_sae, dtype) | {"n_steps": steps[-1]},
    }


def compare(ours: float, peers: dict[str, float]) -> dict[str, float | None]:
    """Return the ratios of speeds, given times of the same unit."""
    return {
        "ratio_to_best_peer": round(min(peers.values()) / ours, 3) if peers else None,
        "ratio_to_sae_lens": round(peers["sae_lens"] / ours, 3) if "sae_lens" in peers else None,
    }


def describe(chosen: argparse.Namespace, d_sae: int, dtype: str) -> dict[str, Any]:
    """Return the sizes of a case."""
    return {"d_in": chosen.d_in, "d_sae": d_sae, "batch_rows": chosen.batch_rows, "k": chosen.k, "dtype": dtype}


def measure(
    chosen: argparse.Namespace, d_sae: int, architecture: Architecture, state: str, dtype: str, peers: list[tuple[str, Peers]]
) -> dict[str, Any]:
    """Measure one case."""
    if state == "training":
        return measure_training(chosen, d_sae, architecture, dtype, peers)
    x = torch.randn(chosen.batch_rows, chosen.d_in, generator=torch.Generator().manual_seed(1))
    made = {peer: child.make(peer, architecture, x, d_sae, chosen.k) for peer, child in peers} if state == "start" and dtype == "float32" else {}
    runs = make_floors(x, d_sae) | {"ours": timed(make_step(architecture, x, d_sae, chosen.k, state, dtype))}
    best = time_together(runs | {peer: run for peer, run in made.items() if not isinstance(run, str)}, chosen.seconds)
    floor, ours = best["floor"], best["ours"]
    torch_floor = best.get("torch_floor", floor)
    others = {peer: best[peer] for peer in made if peer in best}
    return {
        "name": f"train_{architecture}" + ("" if state == "start" else f"_{state}"),
        "value": round(len(x) / ours),
        "unit": "rows/s",
        "ours": round(ours, 5),
        "floor": round(floor, 5),
        "torch_floor": round(torch_floor, 5),
        "ratio_to_floor": round(ours / floor, 3),
        "ratio_to_torch_floor": round(ours / torch_floor, 3),
        **compare(ours, others),
        "peers": {peer: round(best[peer] / floor, 3) if peer in best else run for peer, run in made.items()} or None,
        "state": state,
        "config": describe(chosen, d_sae, dtype),
    }


def main() -> None:
    if any(argument.startswith("--device") for argument in sys.argv):
        measure_gpu(sys.argv[1:])
        return
    use_fastest_products()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batches of 1024 and 2048 latents instead of 4096, and 4096 and 16384")
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, nargs="+")
    parser.add_argument("--batch-rows", type=int)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], help="of the products' operands: float32, bfloat16 or float16; the floor stays float32"
    )
    parser.add_argument("--architectures", nargs="+", default=list(RECIPES))
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    parser.add_argument("--peers", default=os.environ.get("BENCH_PEERS", ""), help="interpreter of the environment that has the peers")
    parser.add_argument("--states", nargs="+", default=["start", "sparse", "dead"], help="those of them that an architecture has")
    parser.add_argument("--trained", default="", help="time whole trainings instead, from the states in this folder (train_states.py)")
    parser.add_argument("--append", default="", help="also append the lines to this file")
    chosen = parser.parse_args()
    chosen.d_sae = chosen.d_sae or ([2048] if chosen.quick else [4096, 16384])
    chosen.batch_rows = chosen.batch_rows or (1024 if chosen.quick else 4096)
    if not chosen.peers:
        sys.stderr.write("No peers: name an interpreter that has them with --peers or BENCH_PEERS (how to make one stands in the docstring).\n")
    with open_peers(chosen.peers) as peers:
        cases: list[tuple[int, Architecture, str]] = list(product(chosen.d_sae, chosen.architectures, chosen.dtypes))
        for d_sae, architecture, dtype in cases:
            for state in choose_states(chosen, architecture):
                report(measure(chosen, d_sae, architecture, state, dtype, peers), chosen.append)


def choose_states(chosen: argparse.Namespace, architecture: Architecture) -> list[str]:
    """Return the states in which an architecture is timed."""
    if chosen.trained:
        return ["training"]
    has = {"start": True, "sparse": architecture in SHIFTS, "dead": RECIPES[architecture].is_sparse}
    return [state for state in chosen.states if has[state]]


if __name__ == "__main__":
    main()
