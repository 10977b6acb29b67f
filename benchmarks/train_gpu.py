"""Training steps on a GPU beside the rate that its matrix products were measured at, dense and sparse; `bench_train.py --device cuda` runs it.

    python benchmarks/bench_train.py --device cuda                    d_in 4096, d_sae 131,072, batches of 8,192 to 32,768, bfloat16: minutes, 60 GB
    python benchmarks/bench_train.py --device cuda --quick            d_sae 16,384, one batch of 8,192
    python benchmarks/bench_train.py --device cpu-as-cuda --quick     the same code paths, tiny, without a GPU

It needs torch, numba, pydantic, obstore, PyYAML and jaxtyping, nothing else of the package's dependencies.

Sketch: with B rows, n = d_in, m = d_sae, a dense step is five products of 2 B n m operations; at 790 TFLOP/s, n = 4096, m = 131,072 and B = 8,192
that is 56 ms, and what lies between the products are passes over B m float32 values (4.3 GB, 0.9 ms each way at 4.8 TB/s). Weights, moments
and gradients in float32 are 4 x 2 n m x 4 bytes = 17 GB, bfloat16 copies 2 GB, blocks of 2^30 pre-activations 4.3 GB each.

    value                  rows per second, median of the steps
    ours, floor            seconds of a whole `Trainer.train_step`, and of the five products in the same type
    ratio_to_floor         ours / floor
    share_of_matmul_rate   the five products' operations / ours / `matmul_flops`; dense architectures only
    matmul_flops           the best rate of a square product of 8,192, measured in this run
    ratio_to_dense         ours / the dense step (relu) at the same size: below 1 the sparse path is faster
    peak_device_bytes      most memory that was allocated, the rows included

Steps are timed by events on the device after three that warm up; the host waits for the device within a step, as in a training.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from floors import report

from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import Architecture
from interp_assets.train.recipes import RECIPES, make_weights
from interp_assets.train.trainer import Trainer

ARCHITECTURES: Final[tuple[Architecture, ...]] = ("relu", "topk", "batch_topk", "matryoshka_batch_topk", "jump_relu", "gated")
_WARM_STEPS: Final = 3
_SQUARE: Final = 8192


class Size(NamedTuple):
    """One case."""

    d_in: int
    d_sae: int
    batch_rows: int
    k: int
    dtype: str


def main(arguments: list[str]) -> None:
    """Print one JSON line for each architecture and batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", required=True, help="cuda, or cpu-as-cuda for the same code, tiny, on the CPU")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--d-sae", type=int)
    parser.add_argument("--batch-rows", type=int, nargs="+")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--append", default="", help="also append the lines to this file")
    chosen = parser.parse_args(arguments)
    is_tiny = chosen.device != "cuda"
    device = torch.device("cpu" if is_tiny else "cuda")
    d_sae = chosen.d_sae or (256 if is_tiny else 16384 if chosen.quick else 131072)
    batches = chosen.batch_rows or ([64] if is_tiny else [8192] if chosen.quick else [8192, 16384, 32768])
    for batch_rows in batches:
        size = Size(32 if is_tiny else chosen.d_in, d_sae, batch_rows, min(chosen.k, d_sae // 8), chosen.dtype)
        for line in measure(device, size, chosen.architectures, chosen.steps):
            report(line, chosen.append)


def measure(device: torch.device, size: Size, architectures: list[Architecture], n_steps: int) -> Iterator[dict[str, Any]]:
    """Measure the architectures at one size; one that runs out of memory says so, and the others go on."""
    x = torch.randn(size.batch_rows, size.d_in, generator=torch.Generator().manual_seed(1)).to(device)
    rate = measure_rate(device, size)
    floor_s = seconds_of(device, make_floor(x, size), n_steps)
    common = {
        "unit": "rows/s",
        "floor": round(floor_s, 6),
        "matmul_flops": round(rate),
        "ratio_to_best_peer": None,
        "config": size._asdict(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    dense_s: float | None = None
    for architecture in architectures:
        name = f"train_gpu_{architecture}"
        free(device)
        try:
            step_s = seconds_of(device, make_step(architecture, x, size), n_steps)
        except torch.OutOfMemoryError as error:
            yield {"name": name, "value": None, "ours": None, "ratio_to_floor": None, "because": str(error)[:200], **common}
            continue
        dense_s = step_s if architecture == "relu" else dense_s
        operations = 10.0 * size.batch_rows * size.d_in * size.d_sae
        is_sparse = RECIPES[architecture].is_sparse
        yield {
            "name": name,
            "value": round(size.batch_rows / step_s),
            "ours": round(step_s, 6),
            "ratio_to_floor": round(step_s / floor_s, 3),
            "share_of_matmul_rate": None if is_sparse else round(operations / step_s / rate, 3),
            "ratio_to_dense": round(step_s / dense_s, 3) if dense_s else None,
            "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            **common,
        }


def make_step(architecture: Architecture, x: torch.Tensor, size: Size) -> Callable[[], object]:
    """Return one training step; nothing dies, so that AuxK does nothing."""
    config = SaeConfig.model_validate(
        {
            "architecture": architecture,
            "d_sae": size.d_sae,
            "k": size.k,
            "batch_rows": size.batch_rows,
            "n_rows": 1_000_000 * size.batch_rows,
            "dead_after_rows": 1 << 60,
            "product_dtype": size.dtype,
        }
    )
    weights = make_weights(config, x[:1024].cpu(), size.d_in, torch.Generator().manual_seed(0))
    trainer = Trainer(config, weights, x.device)
    return lambda: trainer.train_step(x)


def make_floor(x: torch.Tensor, size: Size) -> Callable[[], object]:
    """Return the five products of a dense step, into tensors that are there already."""
    dtype = getattr(torch, size.dtype)
    a, W = x.to(dtype), torch.randn(size.d_sae, size.d_in, device=x.device, dtype=dtype)
    latents, x_hat, gradient = torch.empty(len(x), size.d_sae, device=x.device, dtype=dtype), torch.empty_like(a), torch.empty_like(W)

    def run() -> None:
        torch.mm(a, W.T, out=latents)
        torch.mm(latents, W, out=x_hat)
        torch.mm(a, W.T, out=latents)
        torch.mm(latents.T, a, out=gradient)
        torch.mm(latents.T, a, out=gradient)

    return run


def measure_rate(device: torch.device, size: Size) -> float:
    """Return the operations per second of a large square product."""
    n, dtype = (_SQUARE if device.type == "cuda" else 128), getattr(torch, size.dtype)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / seconds_of(device, lambda: torch.mm(a, b, out=out), 20)


def seconds_of(device: torch.device, run: Callable[[], object], n: int) -> float:
    """Return the median seconds of `n` runs, after some that warm up."""
    for _ in range(_WARM_STEPS):
        run()
    if device.type != "cuda":
        return statistics.median([_seconds(run) for _ in range(n)])
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median([begin.elapsed_time(end) / 1000 for begin, end in events])


def free(device: torch.device) -> None:
    """Give back what the last architecture held, and count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
