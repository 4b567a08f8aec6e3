"""Intrinsic dimension of manifolds whose dimension is known, within standard errors, and a naive reference."""

import math

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import local_intrinsic_dimension, two_nn
from lightning_collapse.spectral.neighbors import nearest_distances


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def torus(n: int, d: int, seed: int = 0) -> Tensor:
    """A flat torus of dimension ``d`` in ``2 d``: no boundary and constant density."""
    angles = 2 * math.pi * torch.rand(n, d, generator=generator(seed), dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def cube(n: int, d: int, width: int = 30, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(torch.randn(width, d, generator=generator(99), dtype=torch.float64))[0]
    return torch.rand(n, d, generator=generator(seed), dtype=torch.float64) @ basis.T + 5


def sphere(n: int, d: int, seed: int = 0) -> Tensor:
    rows = torch.randn(n, d + 1, generator=generator(seed), dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("method", ["fit", "mle"])
@pytest.mark.parametrize("discard", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("make", [torus, sphere])
@pytest.mark.parametrize("d", [1, 2, 4])
def test_two_neighbours(make, d: int, method: str, discard: float) -> None:
    found = two_nn(make(1500, d), discard, method)
    # ratios of neighbours depend a little on each other, and the fit is less efficient: twice the naive standard error
    error = 2 / math.sqrt(1500 * (1 - discard))
    assert found.dimension.item() == pytest.approx(d, rel=3 * error)
    assert (found.n, found.ties) == (1500, 0)


@pytest.mark.parametrize("method", ["mle", "moments"])
@pytest.mark.parametrize("make", [torus, sphere])
@pytest.mark.parametrize("d", [1, 2, 4])
def test_many_neighbours(make, d: int, method: str) -> None:
    k = 10
    found = local_intrinsic_dimension(make(3000, d), k, method)
    # a row's inverse has relative standard error 1 / sqrt(k - 1); about every k-th row is independent. Besides, the
    # curvature and the missing variance of the density at a distance of k / n of the volume cost up to 3 %.
    assert found.dimension.item() == pytest.approx(d, rel=3 / math.sqrt(3000 * (k - 1) / k) + 0.03)
    assert found.n == 3000
    if method == "mle":  # the estimate of one row is unbiased, so their mean is right too
        spread = 1 / math.sqrt(k - 3)
        assert found.local.mean().item() == pytest.approx(d, rel=3 * spread / math.sqrt(3000 / k) + 0.03)


def test_a_cube_has_a_boundary() -> None:
    for d in (1, 2, 3):
        rows = cube(2000, d)
        assert two_nn(rows).dimension.item() == pytest.approx(d, rel=0.12)
        assert local_intrinsic_dimension(rows).dimension.item() == pytest.approx(d, rel=0.12)
    dimensions = [two_nn(cube(1000, d)).dimension.item() for d in (1, 2, 4, 8, 16)]
    assert dimensions == sorted(dimensions)


def test_a_ball_around_a_row_in_closed_form() -> None:
    # neighbours of the first row at distances 1, 2, 3, 4; the others are far away and together
    rows = torch.tensor([[0.0, 0], [1, 0], [-2, 0], [0, 3], [0, -4], [99, 99], [99, 90]])
    mle = local_intrinsic_dimension(rows, 4).local[0]
    assert mle.item() == pytest.approx(2 / (math.log(4) + math.log(2) + math.log(4 / 3)))
    assert local_intrinsic_dimension(rows, 4, "moments").local[0].item() == pytest.approx(2 / (4 - 2))


def naive(rows: Tensor, discard: float) -> tuple[float, float]:
    rows = rows.double()
    ratios = []
    for i, row in enumerate(rows):
        others = sorted((row - other).norm().item() for j, other in enumerate(rows) if j != i)
        ratios.append(math.log(others[1] / others[0]))
    ratios.sort()
    n, m = len(ratios), min(math.floor(len(ratios) * (1 - discard)), len(ratios) - 1)
    heights = [-math.log(1 - (i + 1) / n) for i in range(m)]
    fit = sum(h * x for h, x in zip(heights, ratios, strict=False)) / sum(x * x for x in ratios[:m])
    return fit, (n - 1) / sum(ratios)


@pytest.mark.parametrize("discard", [0.0, 0.1, 0.5])
def test_a_naive_reference(discard: float) -> None:
    rows = torch.randn(60, 5, generator=generator())
    fit, mle = naive(rows, discard)
    assert two_nn(rows, discard).dimension.item() == pytest.approx(fit, rel=1e-9)
    assert two_nn(rows, 0.0, "mle").dimension.item() == pytest.approx(mle, rel=1e-9)


def test_distances_are_exact_far_away_and_for_close_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(200, 7, generator=generator(), dtype=torch.float64) * 1e-6
    rows[100:] += 1  # two tight clusters
    squares = (rows.unsqueeze(1) - rows).square().sum(dim=2).fill_diagonal_(torch.inf)
    exact = squares.topk(5, largest=False).values.sqrt()
    whole = nearest_distances(rows, 5)[0]
    torch.testing.assert_close(whole / whole[0, 0], exact / exact[0, 0], rtol=1e-3, atol=0)
    torch.testing.assert_close(whole[:, 0] / whole[0, 0], exact[:, 0] / exact[0, 0], rtol=1e-8, atol=0)
    monkeypatch.setattr("lightning_collapse.spectral.neighbors.TILE_ELEMENTS", 200 * 7)
    torch.testing.assert_close(nearest_distances(rows, 5)[0], whole, rtol=1e-3, atol=0)


def test_neither_units_nor_rotations_matter() -> None:
    rows = cube(300, 3, 8)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator(), dtype=torch.float64))[0]
    for estimate in (two_nn, local_intrinsic_dimension):
        expected = estimate(rows).dimension.item()
        for scale in (1e-200, 1e-3, 1e200):
            assert estimate(scale * (rows @ turn)).dimension.item() == pytest.approx(expected, rel=1e-7)
        assert estimate(rows + 1e4).dimension.item() == pytest.approx(expected, rel=1e-5)


def test_repeated_rows_are_counted_and_change_nothing() -> None:
    rows = torch.randn(200, 4, generator=generator())
    for estimate in (two_nn, local_intrinsic_dimension):
        expected = estimate(rows)
        for again in (torch.cat([rows, rows]), rows.repeat_interleave(3, dim=0), torch.cat([rows[150:], rows])):
            found = estimate(again)
            assert found.dimension.item() == pytest.approx(expected.dimension.item(), rel=1e-12)
            assert found.n == 200
            assert found.ties == len(again) - 200


def test_rows_on_a_grid_are_ties_and_not_of_infinite_dimension() -> None:
    grid = torch.cartesian_prod(torch.arange(20.0), torch.arange(20.0))
    found = two_nn(grid)
    assert found.n == 0
    assert found.ties == 400
    assert found.dimension.isnan()
    rounded = (torch.rand(600, 1, generator=generator()) * 1000).round()
    assert two_nn(rounded).ties > 200
    assert 0.5 < two_nn(rounded).dimension < 3


def test_half_precision_is_promoted_under_autocast_too() -> None:
    rows = torch.randn(300, 6, generator=generator()).bfloat16()
    for estimate in (two_nn, local_intrinsic_dimension):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = estimate(rows)
        assert found.dimension.dtype == torch.float64
        assert found.dimension == estimate(rows.double()).dimension
        assert found.dimension.item() == pytest.approx(estimate(rows.double()).dimension.item())


def test_rows_with_bad_numbers_and_masked_ones_are_left_out() -> None:
    rows = torch.randn(200, 4, generator=generator())
    kept = torch.ones(200, dtype=torch.bool)
    kept[[3, 7, 11]], kept[150:] = False, False
    mask = torch.arange(200) < 150
    spoiled = rows.clone()
    spoiled[3], spoiled[7, 1], spoiled[11, 0] = torch.nan, torch.inf, -torch.inf
    for estimate in (two_nn, local_intrinsic_dimension):
        found = estimate(spoiled, mask=mask)
        assert found.dimension.item() == pytest.approx(estimate(rows[kept]).dimension.item(), rel=1e-12)
        assert (found.n, found.ties) == (147, 0)
    local = local_intrinsic_dimension(spoiled, mask=mask).local
    assert torch.equal(local.isfinite(), kept)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(0, 3),
        torch.ones(1, 3),
        torch.ones(50, 3),
        torch.full((50, 3), torch.nan),
        torch.tensor([[0.0], [1.0]]),
        torch.zeros(4, 0),
    ],
    ids=["none", "one", "all equal", "nan", "two", "no features"],
)
def test_where_there_is_no_dimension(rows: Tensor) -> None:
    assert two_nn(rows).dimension.isnan()
    assert two_nn(rows, method="mle").dimension.isnan()
    for method in ("mle", "moments"):
        assert local_intrinsic_dimension(rows, method=method).dimension.isnan()
    assert two_nn(torch.ones(50, 3)).ties == 49


def test_fewer_rows_than_neighbours() -> None:
    rows = torch.randn(8, 2, generator=generator())
    assert local_intrinsic_dimension(rows, 100).dimension == local_intrinsic_dimension(rows, 7).dimension
    assert local_intrinsic_dimension(rows, 7).n == 8


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: two_nn(torch.ones(3)), r"`features` must have shape \(N, D\), got \(3,\)"),
        (lambda: two_nn(torch.ones(3, 2), discard=1.0), "`discard` is a share and must be at least 0 and less than 1"),
        (lambda: two_nn(torch.ones(3, 2), method="slope"), "`method` must be 'fit' or 'mle', got 'slope'"),
        (lambda: local_intrinsic_dimension(torch.ones(3, 2), k=2), "`k` must be at least 3, got 2"),
        (lambda: local_intrinsic_dimension(torch.ones(3, 2), method="x"), "`method` must be 'mle' or 'moments'"),
        (lambda: local_intrinsic_dimension(torch.ones(3, 2, 2)), "Flatten tokens or pool maps first"),
    ],
)
def test_bad_arguments(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
