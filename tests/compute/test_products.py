"""Float32 is multiplied by the library that the kind of CPU calls for, in float32's accuracy, whoever asks first."""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llvmlite import binding
from torch import Tensor

from interp_assets.compute.products import find_features, is_faster_by_onednn, is_float32, permit_onednn, use_fastest_products

ROOT = Path(__file__).parents[2]
ZEN = {"avx2", "avx512f", "avx512bf16", "avx512vnni"}
TILES = {"amx-tile", "amx-bf16"}
WORLDS = """
import os, sys
from pathlib import Path
from conftest import _make_planted
from interp_assets.train.loop import train_saes
planted = _make_planted([{"name": "a", "architecture": "relu", "d_sae": 48, "k": 2, "n_rows": 200, "batch_rows": 100, "dead_after_rows": 500}])
train_saes(planted.pipeline, planted.store, ["a"])
"""
FORWARD = """
import sys
from pathlib import Path
import torch
from tiny_models import save_model
from interp_assets.planning.config import ExecutionConfig, ModelConfig
from interp_assets.garcon.subject import load_subject_model
subject = load_subject_model(ModelConfig(name=str(save_model(Path(sys.argv[1]) / "model", "gpt2"))), ExecutionConfig(device="cpu"))
subject.logits(torch.arange(64).view(2, 32) % 40, None)
"""


def is_suited() -> bool:
    """Tell whether this machine's kind is one that oneDNN is chosen for."""
    return is_faster_by_onednn(platform.machine(), binding.get_host_cpu_name(), find_features())


def rounded(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a product whose operands are rounded."""
    return lambda a, b: a.to(dtype).float() @ b.to(dtype).float()


@pytest.mark.parametrize(
    ("machine", "cpu", "features", "expected"),
    [
        ("x86_64", "znver5", ZEN, True),
        ("AMD64", "znver4", ZEN, True),
        ("x86_64", "znver3", {"avx2"}, False),
        ("x86_64", "znver7", ZEN | TILES, False),
        ("x86_64", "sapphirerapids", ZEN | TILES, False),
        ("x86_64", "sapphirerapids", ZEN, False),
        ("x86_64", "cascadelake", ZEN, False),
        ("x86_64", "generic", ZEN, False),
        ("aarch64", "neoverse-v2", {"bf16"}, False),
    ],
)
def test_the_kind_of_cpu_alone_decides(machine: str, cpu: str, features: set[str], *, expected: bool) -> None:
    """Timing would make bytes depend on who else is busy. With tiles oneDNN would round operands; Intel's are refused by name as well."""
    assert is_faster_by_onednn(machine, cpu, features) == expected


def test_products_stay_float32() -> None:
    """Shapes and layouts of harvests and trainings, after the choice, against float64: bfloat16 would be off by 2e-3."""
    use_fastest_products()
    generator = torch.Generator().manual_seed(0)
    for rows, width, columns in ((1, 512, 512), (7, 33, 129), (100, 16, 48), (512, 256, 768), (1024, 512, 2048)):
        a, b = torch.randn(rows, width, generator=generator), torch.randn(width, columns, generator=generator)
        bias, sums = torch.randn(columns, generator=generator), torch.randn(rows, columns, generator=generator)
        exact = a.double() @ b.double()
        a_T, b_T = a.T.contiguous().T, b.T.contiguous().T
        found = [a @ b, a_T @ b, a @ b_T, a_T @ b_T, torch.addmm(bias, a, b) - bias, sums.clone().addmm_(a, b) - sums, torch.bmm(a[None], b[None])[0]]
        for product in found:
            assert float((product.double() - exact).norm() / exact.norm()) < 2e-6, (rows, width, columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_operands_are_told_from_float32(dtype: torch.dtype) -> None:
    """The check must be able to fail."""
    assert is_float32(torch.mm)
    assert not is_float32(rounded(dtype))
    assert not is_float32(lambda a, b: (a @ b) * float("nan"))


def test_a_permission_that_rounds_is_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    """A processor whose tiles nobody told of must not train in bfloat16 unasked."""
    setting = SimpleNamespace(fp32_precision="none")
    with caplog.at_level(logging.WARNING):
        assert not permit_onednn(setting, rounded(torch.bfloat16))
    assert setting.fp32_precision == "none"
    assert "rounds the operands" in caplog.text


@pytest.mark.parametrize("chosen", ["ieee", "tf32", "bf16"])
def test_a_precision_that_was_set_before_stays(chosen: str) -> None:
    """It belongs to whoever runs the process; a torch without the setting is left alone too."""
    setting = SimpleNamespace(fp32_precision=chosen)
    assert not permit_onednn(setting)
    assert setting.fp32_precision == chosen
    assert not permit_onednn(SimpleNamespace())


def test_threads_agree_and_asking_again_changes_nothing() -> None:
    """Stages run on threads of one process."""
    with ThreadPoolExecutor(4) as pool:
        answers = {future.result() for future in [pool.submit(use_fastest_products) for _ in range(16)]}
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert answers == {use_fastest_products()}
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is torch's own choice elsewhere")
@pytest.mark.parametrize("script", [WORLDS, FORWARD], ids=["training", "harvest"])
def test_stages_multiply_by_the_chosen_library(script: str, tmp_path: Path) -> None:
    """In verbose mode oneDNN tells of each product it makes: in a process that has called nothing else."""
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "tests/train", "tests/support"))
    environment = {**os.environ, "ONEDNN_VERBOSE": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if ",matmul,brg_matmul:" in line and "src:f32" in line]
    checks = 2 * 2 if is_suited() else 0
    assert (len(lines) > checks) == is_suited()


def test_a_precision_set_at_any_level_stays() -> None:
    """There are three places for it, and each is an answer."""
    script = """
import torch
from interp_assets.compute.products import permit_onednn
matmul = torch.backends.mkldnn.matmul
for place in (torch.backends, torch.backends.mkldnn):
    place.fp32_precision = "ieee"
    print(permit_onednn(matmul), matmul.fp32_precision)
    place.fp32_precision = "none"
torch.set_float32_matmul_precision("highest")
print(permit_onednn(matmul), matmul.fp32_precision)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "ieee"] * 3
