"""Every path that a GPU takes, once, against the CPU's numbers, then the two GPU benchmarks: one script for a machine that is lent for minutes.

    python benchmarks/gpu_smoke.py --device cuda --append smoke.jsonl --minutes 9
    python benchmarks/gpu_smoke.py --device cpu --append rehearsal.jsonl              the same code, tiny, without a GPU: a test does it

Each step's line is written, and flushed, when the step ends, so that a run which is cut short keeps what it had; the same command with the same file
goes on from there: steps whose line says `ok` are not done again. A step that fails says why, and the next one begins. Steps begin only while
there is time, and benchmarks are stopped at its end.

    harvest      an activation shard of a small GPT-2, stored in bfloat16, beside that of the CPU
    train <a>    ten steps of each architecture from the same weights and rows, beside the CPU's; which runs the Triton kernels of `compute/fused.py`
                 on the GPU and the compiled loops on the CPU
    encode <d>   the firings of pass A by the path that is chosen here (the Triton kernel), beside the plain one
    kernels      `compute/fused.py`'s passes beside their definition; on a CPU, which has none, skipped
    two ranks    the same steps by two processes that share rows, and by two that share latents: NCCL where there are two GPUs, gloo on a CPU
    bench ...    `bench_train.py` and `bench_visualize.py`, small sizes first; their lines follow, as they come

`value` is seconds, `difference` the largest relative one, `ok` whether it is within `limit`. The exit status is 1 when a step failed.
It needs what `bench_train.py --device cuda` needs, and transformers and pyarrow.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from floors import report
from train_gpu import ARCHITECTURES

from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import Architecture
from interp_assets.train.parallel import ONE_RANK, Ranks, make_ranks
from interp_assets.train.recipes import make_weights
from interp_assets.train.trainer import Trainer

STEPS: Final = 10
_HERE: Final = Path(__file__).parent
_LEAST_S: Final = 5.0


class Skipped(Exception):  # noqa: N818 - nothing went wrong
    """A step that this machine has nothing for."""


def train(architecture: Architecture, device: torch.device, *, is_tiny: bool, ranks: Ranks = ONE_RANK) -> dict[str, torch.Tensor]:
    """Return this rank's weights after a few steps."""
    d_in, d_sae, n = (32, 128, 64) if is_tiny else (512, 4096, 2048)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(STEPS, n, d_in, generator=generator)
    sizes = {"d_sae": d_sae, "k": 8, "batch_rows": n, "n_rows": 1000 * n, "dead_after_rows": 4 * n, "learning_rate": 1e-3}
    config = SaeConfig.model_validate({"architecture": architecture, **sizes})
    trainer = Trainer(config, make_weights(config, rows[0], d_in, torch.Generator().manual_seed(0)), device, ranks)
    for x in rows:
        trainer.train_step(x[ranks.share(n)].to(device))
    return {name: value.detach().cpu() for name, value in trainer.weights.items()}


def differ(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest distance of two weights, beside their norm."""
    norms = {name: float(value.double().norm()) or 1.0 for name, value in expected.items()}
    return max(float((found[name].double() - value.double()).norm()) / norms[name] for name, value in expected.items())


def check_training(architecture: Architecture, device: torch.device, *, is_tiny: bool) -> dict[str, Any]:
    """Train here and on the CPU."""
    difference = differ(train(architecture, device, is_tiny=is_tiny), train(architecture, torch.device("cpu"), is_tiny=is_tiny))
    return {"difference": difference, "limit": 0.02}  # a latent that changes sides at a tie moves its row by one update of ten


def check_harvest(device: torch.device, *, is_tiny: bool) -> dict[str, Any]:
    """Harvest one shard here and on the CPU, and compare the stored rows."""
    from bench_harvest import Case  # noqa: PLC0415 - needs transformers

    from interp_assets.harvest.rows import open_rows  # noqa: PLC0415

    found = []
    for where in (torch.device("cpu"), device):
        with tempfile.TemporaryDirectory() as folder:
            case = Case(Path(folder), "gpt2", *((64, 2, 512) if is_tiny else (512, 6, 32768)))
            case.net.to(where)
            pipeline, store = case.publish("bfloat16")
            case.harvest(pipeline, store)
            rows = open_rows(pipeline, store, f"resid_post.{case.layer}", 0)
            found.append(rows.read(0, rows.n_rows).double())
    return {"difference": float((found[0] - found[1]).norm() / found[0].norm()), "limit": 0.01, "rows": len(found[0])}


def check_encoder(dtype: str, device: torch.device, *, is_tiny: bool) -> dict[str, Any]:
    """Find the firings of some rows by the path that is chosen here, and by the plain one."""
    from bench_visualize import make_setting  # noqa: PLC0415

    from interp_assets.visualize.encoder import Encoder  # noqa: PLC0415

    n_rows, n_latents, d_in = (256, 512, 32) if is_tiny else (4096, 16384, 1024)
    setting = make_setting(n_rows, n_latents, 16, d_in=d_in)
    limits = np.full(n_rows, -np.inf, np.float32)
    scans = []
    for path in ("auto", "plain"):
        encoder = Encoder(setting.sae, 0, n_latents, device, dtype=dtype, path=path)  # pyright: ignore[reportArgumentType]
        found = encoder.scan(encoder.prepare(setting.rows, n_rows, "here"), limits)
        scans.append(np.concatenate([scan.latents.astype(np.int64) << 32 | scan.rows for scan in found]))
    differing, n = len(np.setxor1d(*scans)), len(scans[1])
    return {"difference": differing / max(1, n), "limit": 1e-4, "firings": n}  # those at a threshold


def check_kernels(device: torch.device) -> dict[str, Any]:
    """Compare the passes that lie between products with their definition in double precision."""
    from interp_assets.compute import elementwise, fused  # noqa: PLC0415

    if device.type != "cuda" or not fused.has_triton():
        raise Skipped("no CUDA device with Triton")
    n_rows, n_latents = 3 * fused.PART + 5, 2 * fused.BN + 7
    pre, offset = torch.randn(n_rows, n_latents, device=device), torch.randn(n_latents, device=device)
    latents, exact = torch.empty_like(pre), torch.empty_like(pre, dtype=torch.float64)
    sums, expected = fused.fire(pre, offset, latents), elementwise.fire(pre.double(), offset.double(), exact)
    columns, fired = torch.randn(3, n_latents, device=device), torch.tensor(0.3, dtype=torch.float64, device=device)
    grad = torch.randn(n_rows, n_latents, device=device)
    grad_exact = grad.double()
    pulled = fused.pull(pre, grad, columns, fired, 0.8, reaches_encoder=True)
    pulled_exact = elementwise.pull(pre.double(), grad_exact, elementwise.Slopes(*columns.double().unbind(), fired, 0.8, True))
    pairs = [(latents, exact), (grad, grad_exact), (sums, torch.stack(expected)), (pulled, torch.stack(pulled_exact))]
    return {"difference": max(float((a.double() - b).norm() / b.norm()) for a, b in pairs), "limit": 1e-5}


def check_ranks(device: torch.device, seconds: float) -> dict[str, Any]:
    """Let two processes train, rows shared and latents shared, and compare with one."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        raise Skipped("one CUDA device")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--rank", device.type]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != 2:
        raise RuntimeError(done.stderr[-500:] or "a rank said nothing")
    return {"difference": max(json.loads(line)["difference"] for line in lines), "limit": 0.02, "backend": json.loads(lines[0])["backend"]}


def be_a_rank(kind: str) -> None:
    """Be one of the two: print how far this one's weights are from those of one process."""
    rank, is_cuda = int(os.environ["RANK"]), kind == "cuda"
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if is_cuda else "gloo")
    expected, found = train("topk", device, is_tiny=not is_cuda), []
    for n_slices in (1, 2):
        ranks = make_ranks(rank, 2, n_slices)
        mine = train("topk", device, is_tiny=not is_cuda, ranks=ranks)
        part = ranks.latents(expected["b_enc"].shape[0])
        whole = {name: value if value.shape == mine[name].shape else _cut(value, part, mine[name]) for name, value in expected.items()}
        found.append(differ(mine, whole))
    sys.stdout.write(json.dumps({"rank": rank, "difference": max(found), "backend": dist.get_backend()}) + "\n")
    sys.stdout.flush()
    dist.destroy_process_group()


def _cut(value: torch.Tensor, part: slice, like: torch.Tensor) -> torch.Tensor:
    """Return the latents' slice of a weight, along whichever dimension it is shorter."""
    return value[part] if value.shape[0] != like.shape[0] else value[:, part]


def list_steps(device: torch.device, seconds: Callable[[], float]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Return the checks, by name."""
    is_tiny = device.type != "cuda"
    yield "harvest", lambda: check_harvest(device, is_tiny=is_tiny)
    yield "kernels", lambda: check_kernels(device)
    for architecture in ARCHITECTURES:
        yield f"train {architecture}", lambda architecture=architecture: check_training(architecture, device, is_tiny=is_tiny)
    for dtype in ("float32", "bfloat16"):
        yield f"encode {dtype}", lambda dtype=dtype: check_encoder(dtype, device, is_tiny=is_tiny)
    yield "two ranks", lambda: check_ranks(device, seconds())


def list_benchmarks(device: torch.device) -> list[list[str]]:
    """Return the command lines of the benchmarks, the short ones first."""
    if device.type != "cuda":
        return [["bench_train.py", "--device", "cpu-as-cuda", "--steps", "2"], ["bench_visualize.py", "--device", "cpu-as-cuda"]]
    fast = ["--architectures", "relu", "topk", "batch_topk"]
    return [
        ["bench_train.py", "--device", "cuda", "--quick", "--steps", "3"],
        ["bench_visualize.py", "--device", "cuda", "--quick"],
        ["bench_visualize.py", "--device", "cuda"],
        ["bench_train.py", "--device", "cuda", "--batch-rows", "16384", *fast],
    ]


def run_benchmark(command: list[str], seconds: float, append: str) -> dict[str, Any]:
    """Pass a benchmark's lines on as they come, and stop it when the time is over."""
    process = subprocess.Popen([sys.executable, str(_HERE / command[0]), *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    killer = threading.Timer(seconds, process.kill)
    killer.start()
    n = 0
    for line in process.stdout:
        n += 1
        sys.stdout.write(line)
        sys.stdout.flush()
        if append:
            with Path(append).open("a") as file:
                file.write(line)
    said = process.stderr.read()
    killer.cancel()
    if process.wait() == -9:
        raise TimeoutError(f"stopped after {n} lines: the time is over")
    if process.returncode:
        raise RuntimeError(said[-500:])
    return {"lines": n}


def take(name: str, work: Callable[[], dict[str, Any]], append: str) -> bool:
    """Do one step, write its line, and tell whether it is well."""
    begun = time.perf_counter()
    try:
        found = work()
        ok = "limit" not in found or found["difference"] <= found["limit"]
    except Skipped as reason:
        found, ok = {"because": str(reason), "is_skipped": True}, True
    except Exception as error:  # noqa: BLE001 - what fails must not take the others' time
        found, ok = {"because": f"{type(error).__name__}: {error}"[:500]}, False
    line = {"name": f"smoke {name}", "value": round(time.perf_counter() - begun, 3), "unit": "s", "ok": ok, "ours": None}
    report({**line, "ratio_to_floor": None, "ratio_to_best_peer": None, **found}, append)
    return ok


def read_done(append: str) -> set[str]:
    """Return the steps that an earlier run with the same file did."""
    path = Path(append)
    lines = path.read_text().splitlines() if append and path.exists() else []
    found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]  # the last may be cut
    return {line["name"].removeprefix("smoke ") for line in found if line.get("ok")}


def main() -> int:
    """Take all steps that there is time for."""
    if len(sys.argv) == 3 and sys.argv[1] == "--rank":
        be_a_rank(sys.argv[2])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", default=[], help="these steps alone, by name")
    parser.add_argument("--append", default="", help="also append each line to this file, and go on from what it has")
    chosen = parser.parse_args()
    device, end = torch.device(chosen.device), time.monotonic() + 60 * chosen.minutes
    done, failed = read_done(chosen.append), 0

    def left() -> float:
        return end - time.monotonic()

    steps = [
        *list_steps(device, left),
        *((" ".join(("bench", *each)), lambda each=each: run_benchmark(each, left(), chosen.append)) for each in list_benchmarks(device)),
    ]
    for name, work in steps:
        if name not in done and (not chosen.only or name in chosen.only) and left() > _LEAST_S:
            failed += not take(name, work, chosen.append)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
