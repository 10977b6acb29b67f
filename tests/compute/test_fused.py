"""The passes that a GPU runs between products: in Triton's interpreter they equal their definition, and they compile for an H200 without one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interp_assets.compute import elementwise, fused
from interp_assets.compute.elementwise import Gates, Slopes

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton (Linux), no GPU needed"
)

INTERPRETED = """
import torch
import interp_assets.compute.fused as fused
import test_fused as tests
fused.PART, fused.BM, fused.BN = 8, 4, 16  # rows and latents end within a part and within a program
for dtype in (torch.float32, torch.bfloat16):
    tests.compare("cpu", dtype, 13, 29)
    tests.compare("cpu", dtype, 16, 32)
print("all passes agree")
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from interp_assets.compute import fused, fused_kernels as kernels
from interp_assets.visualize import fused as encoder, fused_kernel
sizes = {"PART": fused.PART, "BM": fused.BM, "BN": fused.BN}

def compile_for_h200(kernel, constants, **types):
    names = {name: "i32" for name in ("T", "F", "n_parts", "C")} | types
    signature = {name: "constexpr" if name in constants else names.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

n = 0
for kind in sys.argv[1:]:
    compile_for_h200(kernels.fire_pass, sizes, latents=kind)
    for has_width, reaches in ((False, False), (True, False), (True, True)):
        constants = sizes | {"HAS_WIDTH": has_width, "REACHES": reaches}
        compile_for_h200(kernels.pull_pass, constants, grad=kind, half="fp32", share="fp32")
    compile_for_h200(kernels.open_pass, sizes, opened=kind, latents=kind)
    compile_for_h200(kernels.close_pass, sizes, grad=kind, grad_gate=kind, latents=kind, penalty="fp32")
    blocks = {"D": 4096, "BM": encoder.BM, "BN": encoder.BN, "BK": encoder.BK, "GM": encoder.GM}
    found = {"latent_BC": "*i32", "row_BC": "*i32", "cursor_B": "*i32"}
    compile_for_h200(fused_kernel.encode_and_append, blocks, x_TD=kind, W_FD=kind, **found)
    n += 7
print("compiled", n)
"""


def draw(*shape: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """Draw numbers with a few exact zeros, where "above 0" and "at least 0" part."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    values.view(-1)[::7] = 0.0
    return values.to(device)


def compare(device: str, dtype: torch.dtype, n_rows: int, n_latents: int) -> None:
    """Compare each pass with its definition in double precision."""
    loose = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    pre, offset, columns = (draw(*shape, seed=i, device=device) for i, shape in enumerate(((n_rows, n_latents), (n_latents,), (3, n_latents))))

    def agree(found: torch.Tensor, sums: torch.Tensor, expected: torch.Tensor, expected_sums: tuple[torch.Tensor, ...]) -> None:
        torch.testing.assert_close(found.double(), expected, **loose)
        torch.testing.assert_close(sums.double(), torch.stack(expected_sums), rtol=1e-4, atol=1e-4)

    latents, exact = torch.empty_like(pre, dtype=dtype), torch.empty_like(pre, dtype=torch.float64)
    sums, expected = fused.fire(pre, offset, latents), elementwise.fire(pre.double(), offset.double(), exact)
    agree(latents, sums, exact, expected)
    for width, reaches in ((0.0, False), (0.8, False), (0.8, True)):
        grad = draw(n_rows, n_latents, seed=3, device=device).to(dtype)
        exact, fired = grad.double(), torch.tensor(0.3, dtype=torch.float64, device=device)
        sums = fused.pull(pre, grad, columns, fired, width, reaches_encoder=reaches)
        expected = elementwise.pull(pre.double(), exact, Slopes(*columns.double().unbind(), fired, width, reaches))
        agree(grad, sums, exact, expected)
    opened, opened_exact, exact = torch.empty_like(latents), torch.empty_like(exact), torch.empty_like(exact)
    sums = fused.open_gates(pre, columns, opened, latents)
    expected = elementwise.open_gates(pre.double(), Gates(*columns.double().unbind()), opened_exact, exact)
    agree(latents, sums, exact, expected)
    torch.testing.assert_close(opened.double(), opened_exact, **loose)
    grads = [draw(n_rows, n_latents, seed=seed, device=device).to(dtype) for seed in (4, 5)]
    exacts = [grad.double() for grad in grads]
    sums = fused.close_gates(pre, columns, (grads[0], grads[1]), latents, 0.25)
    expected = elementwise.close_gates(pre.double(), Gates(*columns.double().unbind()), (exacts[0], exacts[1]), exact, 0.25)
    agree(grads[0], sums, exacts[0], expected)


def run(program: str, *arguments: str, **environment: str) -> str:
    """Run a program by itself: Triton decides at its import whether it interprets."""
    variables = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(Path(__file__).parent)} | environment
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=variables, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_passes_equal_their_definition_in_the_interpreter() -> None:
    """Nobody has a GPU in a test run, but arithmetic and masks can be wrong without one."""
    assert "all passes agree" in run(INTERPRETED, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("kind", ["*bf16", pytest.param("*fp32", marks=pytest.mark.faults)])
def test_kernels_compile_for_an_h200(kind: str) -> None:
    """What the interpreter accepts a compiler may refuse; the compiler needs no GPU. What it compiled before, from the same text, Triton keeps."""
    assert "compiled 7" in run(COMPILED, kind)


def test_a_cpu_and_other_types_do_not_take_the_kernels() -> None:
    """There the compiled loops, or torch's own operations, do the same."""
    assert not fused.is_fusable(torch.zeros(2, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_equal_their_definition_on_a_gpu(dtype: torch.dtype) -> None:
    """Compiled, at a size of several programs whose last ones are not full."""
    compare("cuda", dtype, 3 * fused.PART + 5, 2 * fused.BN + 7)
