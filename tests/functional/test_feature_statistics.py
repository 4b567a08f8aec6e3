"""Options and corners of the measures of rows."""

import math

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import (
    alignment,
    dead_dimensions,
    direction_spread,
    feature_std,
    feature_std_floor,
    mean_cosine,
    relative_spread,
    uniformity,
)

MEASURES = [
    feature_std,
    feature_std_floor,
    relative_spread,
    direction_spread,
    dead_dimensions,
    mean_cosine,
    uniformity,
]


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def simplex(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64) - 1 / n


@pytest.mark.parametrize("n", [2, 5, 33])
def test_a_simplex_is_the_lower_bound(n: int) -> None:
    assert mean_cosine(simplex(n)).item() == pytest.approx(-1 / (n - 1))
    for t in (0.5, 2.0, 3.0):
        assert uniformity(simplex(n), t=t).item() == pytest.approx(-2 * t * n / (n - 1))
    assert uniformity(simplex(n)).item() == pytest.approx({33: -4.125}.get(n, -4 * n / (n - 1)))


def test_uniformity_on_the_sphere() -> None:
    # the closed form with Bessel's function, of the expectation before the logarithm
    assert uniformity(noise(1500, 64)).item() == pytest.approx(-3.8752, abs=3e-3)


def test_uniformity_of_two_rows() -> None:
    for angle in (0.1, 1.0, 2.5):
        rows = torch.tensor([[1.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)]], dtype=torch.float64)
        assert uniformity(rows).item() == pytest.approx(-2 * (2 - 2 * math.cos(angle)))
        assert mean_cosine(rows).item() == pytest.approx(math.cos(angle))


def test_rows_are_normalized_without_overflow() -> None:
    rows = torch.tensor([[1e30, 0.0], [0.0, 1e-30], [3e-38, 3e-38], [-1.0, 0.0]])
    unit = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5], [-1.0, 0.0]])
    assert mean_cosine(rows).item() == pytest.approx(mean_cosine(unit).item(), rel=1e-6)
    assert uniformity(rows).item() == pytest.approx(uniformity(unit).item(), rel=1e-6)
    assert alignment(rows, unit).item() == pytest.approx(0, abs=1e-12)


def test_zero_rows_have_no_direction() -> None:
    rows = noise(6, 3)
    padded = torch.cat([rows, torch.zeros(4, 3)])
    assert mean_cosine(padded).item() == pytest.approx(mean_cosine(rows).item(), rel=1e-6)
    assert uniformity(padded).item() == pytest.approx(uniformity(rows).item(), rel=1e-6)


def test_pairs_without_a_direction_are_left_out_of_alignment() -> None:
    x, y = noise(6, 3), noise(6, 3, seed=1)
    padded = torch.cat([x, torch.zeros(2, 3)]), torch.cat([y, noise(2, 3, seed=2)])
    assert alignment(*padded).item() == pytest.approx(alignment(x, y).item(), rel=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_by_hand(alpha: float) -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    expected = (0 + 2**alpha + 2 ** (alpha / 2)) / 3
    assert alignment(x, y, alpha=alpha).item() == pytest.approx(expected)


def test_gradient_of_alignment_where_views_agree() -> None:
    x = noise(5, 3).requires_grad_()
    for alpha in (1.0, 2.0):
        (grad,) = torch.autograd.grad(alignment(x, x.detach().clone(), alpha=alpha), x)
        assert grad.isfinite().all(), alpha


def test_alignment_refuses_what_are_not_views_of_the_same_rows() -> None:
    with pytest.raises(ValueError, match=r"views of the same rows, got shapes \(4, 3\) and \(5, 3\)"):
        alignment(noise(4, 3), noise(5, 3))


@pytest.mark.parametrize(("threshold", "expected"), [(0.01, 0.25), (0.3, 0.5), (1.0, 0.75), (0.0, 0.0)])
def test_threshold_of_dead_dimensions(threshold: float, expected: float) -> None:
    # standard deviations 10, 3, 1 and 0.01, mean 3.5025
    rows = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64) * torch.tensor([10.0, 3.0, 1.0, 0.01])
    assert dead_dimensions(rows * math.sqrt(3 / 4), threshold=threshold) == expected


def test_relative_spread_by_hand() -> None:
    rows = torch.tensor([[3.0, 4.0], [3.0, 4.0]]) + torch.tensor([[5.0, 0.0], [-5.0, 0.0]])
    assert relative_spread(rows).item() == pytest.approx(0.5**0.5)
    assert relative_spread(rows[:1]) == 0
    assert relative_spread(noise(500, 8)).item() == pytest.approx(1, abs=0.01)


def test_direction_spread_by_hand() -> None:
    rows = torch.tensor([[3.0, 4.0], [-30.0, -40.0], [0.0, 0.0]])
    assert direction_spread(rows[:2]).item() == 1
    assert direction_spread(rows.abs()[:2]).item() == pytest.approx(0, abs=1e-7)
    assert direction_spread(rows).item() == 1
    assert direction_spread(rows.abs()).item() == pytest.approx(0, abs=1e-7)  # the origin is no direction
    assert direction_spread(rows[2:]).isnan()
    angles = torch.linspace(-0.1, 0.1, 101, dtype=torch.float64)
    lengths = torch.logspace(-3, 3, 101, dtype=torch.float64).unsqueeze(1)
    fan = lengths * torch.stack([angles.cos(), angles.sin()], dim=1)
    assert direction_spread(fan).item() == pytest.approx(angles.std(correction=0).item(), rel=1e-2)
    assert relative_spread(fan).item() > 0.9


def test_scale_is_seen_by_standard_deviations_only() -> None:
    rows = noise(30, 4) * torch.tensor([1.0, 2.0, 3.0, 0.5])
    assert feature_std_floor(rows).item() == pytest.approx(rows.std(dim=0).min().item(), rel=1e-6)
    assert feature_std(rows).item() == pytest.approx(rows.std(dim=0).mean().item(), rel=1e-6)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_few_rows_that_count(measure) -> None:
    rows = noise(6, 3)
    alone = torch.arange(6) == 2
    nobody = torch.zeros(6, dtype=torch.bool)
    assert measure(rows, nobody).isnan()
    if measure not in (relative_spread, direction_spread):
        assert measure(rows, alone).isnan()
        assert measure(rows[:1]).isnan()
    pair = torch.tensor([True, False, False, True, False, False])
    assert measure(rows, pair).item() == pytest.approx(measure(rows[pair]).item(), rel=1e-6)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_what_is_masked_may_be_anything(measure) -> None:
    rows, mask = noise(12, 3), torch.arange(12) % 2 == 0
    expected = measure(rows, mask)
    for other in (math.nan, math.inf, 1e30):
        spoiled = rows.clone()
        spoiled[~mask] = other
        assert torch.equal(measure(spoiled, mask), expected)
    leaf = rows.clone().requires_grad_()
    value = measure(leaf, mask)
    if value.requires_grad:
        value.backward()
        assert not leaf.grad[~mask].any()
        assert leaf.grad[mask].any()
