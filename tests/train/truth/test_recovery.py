"""How much of a planted truth an SAE found, against the definitions written out, and pairs against SciPy's."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from interp_assets.train.truth.matching import pair_best
from interp_assets.train.truth.recovery import RecoverySums


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (7, 30), (30, 7), (60, 61), (3, 0)])
@pytest.mark.parametrize("kind", ["random", "ties", "negative"])
def test_pairs_are_those_with_the_largest_sum(shape: tuple[int, int], kind: str) -> None:
    """Which pairs is a matter of ties; what they sum up to is not."""
    draws = np.random.default_rng(shape[0])
    table = draws.random(shape) if kind == "random" else draws.integers(-3 if kind == "negative" else 0, 3, shape).astype(float)
    rows, columns = pair_best(table)
    assert len(rows) == len(columns) == min(shape) == len(set(rows.tolist())) == len(set(columns.tolist()))
    expected = linear_sum_assignment(table, maximize=True)
    assert table[rows, columns].sum() == pytest.approx(table[expected].sum())


def test_a_perfect_dictionary_finds_all() -> None:
    """Whatever the order and the sign of its rows."""
    directions = normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    strengths = torch.rand(500, 12, generator=torch.Generator().manual_seed(2)) * (
        torch.rand(500, 12, generator=torch.Generator().manual_seed(3)) < 0.3
    )
    sums = RecoverySums(-3 * directions[order], directions)
    sums.add(strengths[:200, order], strengths[:200])
    sums.add(strengths[200:, order], strengths[200:])
    found = sums.finish()
    assert found[:5] == pytest.approx((1.0, 1.0, 1.0, 1.0, 1.0))
    assert (found.true_l0, found.n_rows) == (pytest.approx(float((strengths > 0).sum(1).double().mean())), 500)


def test_each_number_is_what_the_paper_defines() -> None:
    """Latents that share a feature, one that never fires, one that fires too often: by hand."""
    directions = torch.eye(3, 4)
    W_dec = torch.tensor([[1.0, 0.1, 0, 0], [0.9, 0, 0.2, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]])
    strengths = torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0], [0, 0, 0], [0, 1.0, 1.0]])
    latents = torch.tensor([[1.0, 0, 1.0, 0], [1.0, 0, 1.0, 0], [0, 0, 1.0, 0], [1.0, 0, 1.0, 0]])
    sums = RecoverySums(W_dec, directions)
    sums.add(latents, strengths)
    found = sums.finish()
    assert found.uniqueness == 2 / 4
    precision, recall = [2 / 3, 0.0, 2 / 4, 0.0], [1.0, 0.0, 1.0, 0.0]
    assert found.precision == pytest.approx(sum(precision) / 4)
    assert found.recall == pytest.approx(sum(recall) / 4)
    assert found.f1 == pytest.approx((2 * (2 / 3) / (5 / 3) + 2 * 0.5 / 1.5) / 4)
    cosine = (normalize(W_dec, dim=1) @ directions.T).abs().double().numpy()
    assert found.mcc == pytest.approx(cosine[linear_sum_assignment(cosine, maximize=True)].mean())
    assert found.true_l0 == 5 / 4
