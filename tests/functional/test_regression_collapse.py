"""Neural regression collapse: the optimum in closed form, a reference that follows the definitions, and bad numbers."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from lightning_collapse.functional import nrc1, nrc2, nrc3, nrc3_gamma, regression_collapse


def optimum(n: int = 3, d: int = 7, m: int = 200, weight: float = 5e-2, features: float = 4e-2):
    """Features, targets and weight at the minimum of the regularized unconstrained feature model (Theorem 4.1)."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(m, n, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.3, 0.0], [0.0, 0.8, -0.2], [0.1, 0.0, 1.5]], dtype=torch.float64
    )
    centered = targets - targets.mean(dim=0)
    values, vectors = torch.linalg.eigh(centered.T @ centered / m)
    assert values[0] > weight * features
    shape = vectors @ torch.diag((features / weight) ** 0.5 * (values.sqrt() - (weight * features) ** 0.5)).sqrt()
    basis = torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64))[0]
    head = shape @ basis.T
    rows = (weight / features) ** 0.5 * centered @ (vectors / values.sqrt() @ vectors.T) @ head
    return rows, targets, head, weight * features


def covariance(rows: Tensor) -> Tensor:
    centered = rows - rows.mean(dim=0)
    return centered.T @ centered / len(rows)


def naive(rows: Tensor, targets: Tensor, weight: Tensor) -> tuple[float, float, float]:
    """The definitions, one row at a time, and the minimum by search."""
    h, y, w = rows.numpy(), targets.numpy(), weight.numpy()
    n = y.shape[1]
    axes = np.linalg.svd(h - h.mean(axis=0), full_matrices=False)[2][:n]
    row_basis = np.linalg.qr(w.T)[0]
    units = [row / np.linalg.norm(row) for row in h]
    first = np.mean([np.linalg.norm(u - axes.T @ (axes @ u)) ** 2 for u in units])
    second = np.mean([np.linalg.norm(u - row_basis @ (row_basis.T @ u)) ** 2 for u in units])
    values, vectors = np.linalg.eigh(np.cov(y.T, bias=True))
    product = w @ w.T / np.linalg.norm(w @ w.T)

    def distance(t: float) -> float:
        shape = vectors @ np.diag(np.sqrt(values) - t) @ vectors.T
        return float(np.linalg.norm(product - shape / np.linalg.norm(shape)) ** 2)

    top = np.sqrt(values[0])
    third = minimize_scalar(distance, bounds=(0, top), method="bounded", options={"xatol": 1e-12}).fun
    return float(first), float(second), min(third, distance(0.0), distance(top))


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    units = rows / rows.norm(dim=1, keepdim=True)
    return covariance(rows), units.T @ units / len(rows)


def test_the_optimum_of_the_model_is_collapsed() -> None:
    rows, targets, head, gamma = optimum()
    cov, directions = moments(rows)
    sigma = covariance(targets)
    assert nrc1(cov, directions, 3) == pytest.approx(0, abs=1e-14)
    assert nrc2(directions, head) == pytest.approx(0, abs=1e-14)
    assert nrc3(head, sigma) == pytest.approx(0, abs=1e-14)
    assert nrc3(head, sigma, gamma) == pytest.approx(0, abs=1e-14)
    assert nrc3_gamma(head, sigma) == pytest.approx(gamma, rel=1e-8)
    # the closed form of the distance without norms is for another objective
    root = torch.linalg.eigvalsh(sigma).sqrt().sum()
    assert nrc3(head, sigma, ((root - head.square().sum()) / 3).square()) > 1e-4
    reading = regression_collapse(rows, targets, head)
    assert [reading.nrc1, reading.nrc2, reading.nrc3] == pytest.approx([0, 0, 0], abs=1e-14)
    assert (reading.n, reading.rank) == (200, 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("m", [50, 9])  # more rows than features, and fewer
def test_definitions(seed: int, m: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, targets, weight = (
        torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in ((m, 12), (m, 3), (3, 12))
    )
    rows = rows * torch.arange(1, 13).double().rsqrt() + 0.3
    expected = naive(rows, targets, weight)
    reading = regression_collapse(rows, targets, weight)
    assert [value.item() for value in reading[:3]] == pytest.approx(expected, rel=1e-9)
    cov, directions = moments(rows)
    assert nrc1(cov, directions, 3) == pytest.approx(expected[0], rel=1e-9)
    assert nrc2(directions, weight) == pytest.approx(expected[1], rel=1e-9)
    sigma = covariance(targets)
    assert nrc3(weight, sigma) == pytest.approx(expected[2], rel=1e-9)
    assert nrc3(weight, sigma, nrc3_gamma(weight, sigma)) == pytest.approx(expected[2], rel=1e-9)
    assert 0 <= nrc3_gamma(weight, sigma) <= torch.linalg.eigvalsh(sigma)[0] * (1 + 1e-12)


def test_isotropic_features_read_what_chance_gives() -> None:
    rows = torch.randn(20_000, 20, dtype=torch.float64)
    reading = regression_collapse(rows, rows[:, :4], torch.randn(4, 20))
    # the share inside a random 4 of 20 dimensions has mean 1/5 and standard deviation 0.084 per row
    assert reading.nrc2 == pytest.approx(0.8, abs=4 * 0.084 / 20_000**0.5)
    assert reading.nrc1 == pytest.approx(0.8, abs=0.02)  # the axes are fitted to the same rows


def test_units_do_not_matter_and_rotations_neither() -> None:
    generator = torch.Generator().manual_seed(3)
    rows, targets, weight = (
        torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in ((40, 6), (40, 2), (2, 6))
    )
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    expected = [x.item() for x in regression_collapse(rows, targets, weight)]
    for scale in (1e-150, 1e-3, 1e150):
        found = regression_collapse(scale * rows @ turn, targets, 7 * weight @ turn)
        assert [x.item() for x in found] == pytest.approx(expected, rel=1e-9)


def test_a_weight_without_full_rank_spans_less() -> None:
    rows = torch.eye(4).repeat(3, 1)
    weight = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0]])
    reading = regression_collapse(rows, rows[:, :2], weight)
    assert reading.rank == 1
    assert reading.nrc2.item() == pytest.approx(0.75)


def test_equal_variances_of_targets() -> None:
    assert nrc3(torch.eye(3), 2 * torch.eye(3)) == pytest.approx(0, abs=1e-14)
    assert nrc3(torch.eye(3)[:, [1, 0, 2]] * torch.tensor([1.0, 1.0, 2.0]).sqrt(), torch.eye(3)).isfinite()


def test_a_single_target_has_no_third_measure() -> None:
    reading = regression_collapse(torch.randn(20, 5), torch.randn(20, 1), torch.randn(1, 5))
    assert reading.nrc3.isnan()
    assert reading.nrc1.isfinite()
    assert reading.nrc2.isfinite()
    assert nrc3_gamma(torch.ones(1, 5), torch.ones(1, 1)).isnan()


def test_half_precision_is_promoted_under_autocast_too() -> None:
    rows, targets, head, _ = (x.bfloat16() if isinstance(x, Tensor) else x for x in optimum())
    expected = regression_collapse(rows.double(), targets.double(), head.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = regression_collapse(rows, targets, head)
    assert all(value.dtype == torch.float64 for value in found)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in expected], rel=1e-12)
    assert 0 < found.nrc1 < 1e-3


def test_rows_with_bad_numbers_are_left_out() -> None:
    generator = torch.Generator().manual_seed(3)
    rows, targets, weight = (torch.randn(a, b, generator=generator) for a, b in ((40, 6), (40, 2), (2, 6)))
    expected = regression_collapse(rows[3:30], targets[3:30], weight)
    rows[0, 1], targets[1, 0], rows[2] = torch.nan, torch.inf, -torch.inf
    found = regression_collapse(rows, targets, weight, torch.arange(40) < 30)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in expected], rel=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_nothing_raises_on_numbers(bad: float) -> None:
    good = torch.eye(3)
    for matrix, weight in ((good, torch.full((3, 3), bad)), (torch.full((3, 3), bad), good)):
        assert nrc2(matrix, weight).isnan() or (bad == 0.0 and weight is not good)
        assert nrc3(weight, matrix).isnan()
        assert nrc3_gamma(weight, matrix).isnan()
        assert nrc1(matrix, matrix, 2).isnan() or matrix is good
    for rows in (torch.full((5, 3), bad), torch.zeros(0, 3)):
        assert regression_collapse(rows, rows, good).nrc1.isnan()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: nrc1(torch.eye(3), torch.eye(3), 0), "`targets` is the number of targets and must be positive, got 0"),
        (lambda: nrc1(torch.eye(3), torch.eye(2), 1), "`covariance` and `directions` must have one shape"),
        (lambda: nrc1(torch.ones(3), torch.eye(3), 1), "`covariance` must be a square matrix"),
        (lambda: nrc2(torch.eye(3), torch.ones(2, 4)), r"`weight` must have shape \(n, 3\), got \(2, 4\)"),
        (lambda: nrc3(torch.ones(2, 4), torch.eye(3)), r"one row per target, got \(2, 4\) for 3 targets"),
        (lambda: regression_collapse(torch.ones(4, 3), torch.ones(3, 1)), r"`targets` \(M, n\), got"),
        (
            lambda: regression_collapse(torch.ones(4, 3), torch.ones(4, 1), torch.ones(2, 3)),
            r"`weight` must have shape \(1, 3\), got \(2, 3\)",
        ),
    ],
)
def test_shapes_that_do_not_fit(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
