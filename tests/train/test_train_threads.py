"""Same inputs, same bytes, whatever the number of threads: libraries divide products and sums by it, and we do not."""

import hashlib
from typing import get_args

import pytest
import torch
from torch import Tensor

from interp_assets.compute.elementwise import sum_all, sum_rows
from interp_assets.compute.products import multiply
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import Architecture
from interp_assets.train.losses.calibrate import measure_sae
from interp_assets.train.metrics import ReconstructionSums
from interp_assets.train.recipes import make_weights
from interp_assets.train.sae import Sae
from interp_assets.train.trainer import Trainer

THREADS = (1, 3)
D_IN, D_SAE, ROWS = 64, 384, 2048
"""Sums of so many rows are what libraries divide among threads."""


def draw(*shape: int, seed: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def digest(tensors: dict[str, Tensor]) -> str:
    """Hash the bytes of tensors by name."""
    found = hashlib.blake2b()
    for name, value in sorted(tensors.items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("shape", [(ROWS, D_IN, 512), (1024, 2048, 64), (300, 72, 130), (7, 65, 3)])
def test_products_do_not_depend_on_threads(shape: tuple[int, int, int]) -> None:
    """MKL and oneDNN divide long sums among threads, and round otherwise then."""
    m, k, n = shape
    a, b, c, bias = draw(m, k, seed=0), draw(k, n, seed=1), draw(m, n, seed=2), draw(n, seed=3)
    found = set()
    for n_threads in THREADS:
        torch.set_num_threads(n_threads)
        made = {
            "product": multiply(a, b, torch.empty(m, n)),
            "plus a row": multiply(a, b, torch.empty(m, n), bias=bias),
            "added": multiply(a.T, c, torch.ones(k, n), is_added=True),
            "rows": sum_rows(c),
            "all": sum_all(c).reshape(1),
        }
        found.add(digest(made))
    assert len(found) == 1
    torch.testing.assert_close(made["plus a row"], (a.double() @ b.double() + bias).float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(made["added"], (a.T.double() @ c.double() + 1).float(), rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(made["rows"], c.double().sum(0).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "task"), [*((name, "sae") for name in get_args(Architecture)), ("relu", "skip_transcoder"), ("topk", "skip_transcoder")]
)
def test_trainings_do_not_depend_on_threads(architecture: Architecture, task: str) -> None:
    """A training on a machine of another size is the same training."""
    fields = {"target_hook_point": "mlp_out.0"} if task == "skip_transcoder" else {}
    config = SaeConfig(
        architecture=architecture,
        task=task,
        k=8,
        d_sae=D_SAE,
        batch_rows=ROWS,
        n_rows=2 * ROWS,
        dead_after_rows=ROWS,
        sparsity_coefficient=1.0,
        **fields,
    )
    x = draw(2, ROWS, D_IN, seed=4) * (draw(2, ROWS, D_IN, seed=5) > 1)
    found = set()
    for n_threads in THREADS:
        torch.set_num_threads(n_threads)
        trainer = Trainer(config, make_weights(config, x[0], D_IN, torch.Generator().manual_seed(0)), torch.device("cpu"))
        for batch in x:
            trainer.train_step(batch, batch.roll(1, dims=1) if fields else None)
        numbers = torch.tensor([list(row) for row in trainer.log], dtype=torch.float64)
        found.add(digest({**trainer.state(), "log": numbers}))
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_measurements_do_not_depend_on_threads(kind: str) -> None:
    """Two machines must not report two qualities of one SAE."""
    threshold = torch.full((D_SAE,), 0.5 if kind == "jump_relu" else 0.0)
    sae = Sae(
        kind=kind,
        W_enc=draw(D_IN, D_SAE, seed=6),
        b_enc=draw(D_SAE, seed=7),
        W_dec=draw(D_SAE, D_IN, seed=8) / 30,
        b_dec=draw(D_IN, seed=9),
        threshold=threshold,
        k=8 if kind == "topk" else 0,
    )
    rows = draw(ROWS, D_IN, seed=10)
    found = set()
    for n_threads in THREADS:
        torch.set_num_threads(n_threads)
        sums = ReconstructionSums(sae, torch.zeros(D_IN, dtype=torch.float64))
        sums.add(rows)
        measures = measure_sae(sae, [rows], [rows])
        found.add(
            repr((sums.saebench(), sums.fvu, sums.median_row_fvu, digest(sums.latent_columns()), measures.fvu, digest({"n": measures.n_fired})))
        )
    assert len(found) == 1
