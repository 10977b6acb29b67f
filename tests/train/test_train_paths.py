"""Which way a step takes, counted: matrix products where much fires, pairs where little does. Equal numbers alone could come from either."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interp_assets.compute.kernels import Scratch
from interp_assets.planning.options import Architecture
from interp_assets.train.losses.loss import FEW, LossContext, StepLoss, Weights
from interp_assets.train.parallel import ONE_RANK
from interp_assets.train.recipes import RECIPES

BATCH, D_IN, D_SAE, K = 64, 8, 256, 4
PRODUCTS = {"aten.mm", "aten.addmm", "aten.addmm_", "aten.bmm", "aten.baddbmm"}


class CountProducts(TorchDispatchMode):
    """Counts products of matrices of the size of a batch or of all latents; vectors are not counted."""

    def __init__(self) -> None:
        """Start at none."""
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and pass on."""
        name = str(func).rsplit(".", 1)[0]
        sizes = [tuple(value.shape) for value in args if isinstance(value, torch.Tensor)]
        self.n += name in PRODUCTS and all(min(size) > 1 for size in sizes[-2:])
        return func(*args, **(kwargs or {}))


def count(architecture: Architecture, shift: float, dtype: torch.dtype = torch.float32) -> tuple[int, StepLoss]:
    """Count the products of one step on a batch whose pre-activations are `shift` below their usual level."""
    generator = torch.Generator().manual_seed(0)
    weights: Weights = {
        "W_enc_T": torch.randn(D_SAE, D_IN, generator=generator),
        "b_enc": torch.full((D_SAE,), -shift),
        "W_dec": torch.randn(D_SAE, D_IN, generator=generator),
        "b_dec": torch.zeros(D_IN),
    }
    if architecture == "gated":
        weights |= {"r_mag": torch.zeros(D_SAE), "b_mag": torch.full((D_SAE,), -shift)}
    if architecture.startswith("jump_relu"):
        weights |= {"log_threshold": torch.full((D_SAE,), -3.0)}
    x = torch.randn(BATCH, D_IN, generator=generator)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    context = LossContext(k=K, coefficient=0.1, n_rows=BATCH, is_dead=dead, ranks=ONE_RANK, scratch=Scratch(), widths=(D_IN,), dtype=dtype)
    with torch.no_grad():
        RECIPES[architecture].loss(weights, x, x, context)  # what a process tries once does not count
        with CountProducts() as counter:
            loss = RECIPES[architecture].loss(weights, x, x, context)
    return counter.n, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "many", "few"), [("relu", 5, 0), ("gated", 7, 0), ("jump_relu_step", 5, 0), ("jump_relu", 5, 3), ("jump_relu_tanh", 5, 3)]
)
def test_a_dense_architecture_goes_by_pairs_once_few_latents_fire(architecture: Architecture, many: int, few: int, dtype: torch.dtype) -> None:
    """No product instead of five or seven, one where operands are rounded; three where a wide rectangle gives silent latents a gradient."""
    (n_many, much), (n_few, little) = count(architecture, 0.0, dtype), count(architecture, 6.0, dtype)
    assert int(much.n_fired.sum()) > BATCH * D_SAE / 4
    assert 0 < int(little.n_fired.sum()) < BATCH * D_SAE * FEW
    assert (n_many, n_few) == (many, few if dtype == torch.float32 else max(few, 1))


@pytest.mark.parametrize(("architecture", "n_products"), [("topk", 0), ("batch_topk", 1), ("matryoshka_batch_topk", 1)])
def test_the_topk_family_multiplies_densely_only_to_encode(architecture: Architecture, n_products: int) -> None:
    """Decoding and all gradients are by pairs, however much fires before the choice. The encoder's threads aren't seen, only the batch's guess."""
    n, found = count(architecture, 0.0)
    assert n == n_products
    assert int(found.n_fired.sum()) == BATCH * K
