"""Closed forms of Barlow Twins."""

import math

import pytest
import torch

from lightning_collapse.losses import BarlowTwins, barlow_twins_terms
from tests.losses.cases.base import whitened


def test_whitened_views_that_agree_read_what_eps_leaves() -> None:
    first, second = whitened(2)  # (16, 15), variance 1
    terms = barlow_twins_terms(first, second)
    assert terms["invariance"].item() == pytest.approx(15 * (1e-5 / (1 + 1e-5)) ** 2)
    assert terms["redundancy"].item() == pytest.approx(0, abs=1e-12)
    # features in another order agree with nothing of the other view
    terms = barlow_twins_terms(first, second.roll(1, dims=1))
    assert terms["invariance"].item() == pytest.approx(15)
    assert terms["redundancy"].item() == pytest.approx(15, rel=1e-4)


def test_copies_of_one_feature() -> None:
    column = torch.randn(64, 1, dtype=torch.float64) * 1e3
    terms = barlow_twins_terms(column.expand(-1, 5), column.expand(-1, 5))
    assert terms["invariance"].item() == pytest.approx(0, abs=1e-12)
    assert terms["redundancy"].item() == pytest.approx(5 * 4)


def test_independent_views() -> None:
    n, d, draws = 400, 20, 20
    values = [BarlowTwins(redundancy=0.5)(torch.randn(n, d), torch.randn(n, d)).item() for _ in range(draws)]
    assert sum(values) / draws == pytest.approx(d + d / n + 0.5 * d * (d - 1) / n, rel=0.01)


def test_it_does_not_see_scale() -> None:
    first, second = torch.randn(2, 32, 6, dtype=torch.float64)
    scale = torch.linspace(100, 1000, 6)
    assert BarlowTwins()(first * scale, second).item() == pytest.approx(BarlowTwins()(first, second).item(), rel=1e-4)


def test_both_sides_are_one_loss() -> None:
    """``N < D`` takes the Gram matrices; padding with constant features moves to that side and adds ``D`` ones."""
    first, second = torch.randn(2, 12, 5, dtype=torch.float64)
    wide = [torch.cat([z, z.new_zeros(12, 20)], dim=1) for z in (first, second)]
    narrow, padded = barlow_twins_terms(first, second), barlow_twins_terms(*wide)
    assert padded["invariance"].item() == pytest.approx(narrow["invariance"].item() + 20)
    assert padded["redundancy"].item() == pytest.approx(narrow["redundancy"].item())


def test_collapse_grows_with_the_width() -> None:
    loss = BarlowTwins()
    assert math.isnan(loss.value_at_collapse)
    constant = torch.full((8, 7), 2.0)
    assert loss(constant, constant).item() == loss.at_collapse(8, 7) == 7
    assert repr(loss) == "BarlowTwins(invariance=1.0, redundancy=0.0051, eps=1e-05)"


def test_positive_eps() -> None:
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        BarlowTwins(eps=0)
