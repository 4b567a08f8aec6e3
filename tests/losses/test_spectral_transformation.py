"""Closed forms of spectral transformations: what they make of eigenvalues, and the floor of the trace loss."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.losses import INTL, SpectralTransformation, intl_terms, spectral_transformation_terms
from lightning_collapse.losses.spectral_transformation import iter_norm_eigenvalue
from lightning_collapse.losses.support.symmetric_power import iter_norm, symmetric_power
from tests.losses.cases.base import whitened
from tests.losses.cases.whitening import naive_distance, naive_iter_norm, naive_zca, well_conditioned


def covariance(eigenvalues: list[float]) -> Tensor:
    basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    return basis @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ basis.mT


@pytest.mark.parametrize(("share", "expected"), [(1e-3, 0.0253), (1e-2, 0.2255), (0.1, 0.9186), (1.0, 1.0)])
def test_four_iterations(share: float, expected: float) -> None:
    assert iter_norm_eigenvalue(share, 4) == pytest.approx(expected, abs=5e-5)


def test_iter_norm_maps_eigenvalues() -> None:
    values = [0.5, 1.0, 2.5, 6.0]
    matrix = covariance(values)
    found = torch.linalg.eigvalsh(iter_norm(matrix, 4) @ matrix @ iter_norm(matrix, 4))
    torch.testing.assert_close(found, torch.tensor([iter_norm_eigenvalue(v / 10, 4) for v in values]).double())
    many = iter_norm(matrix, 10)
    torch.testing.assert_close(many @ matrix @ many, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(("axes", "floor"), [(256, 209.6), (64, 28.8)])
def test_floor_of_the_trace_loss(axes: int, floor: float) -> None:
    assert axes * (1 - iter_norm_eigenvalue(1 / axes, 4)) ** 2 == pytest.approx(floor, abs=0.05)


def test_isotropic_covariance_reads_the_floor_and_no_other_less() -> None:
    loss = SpectralTransformation(power=None, trace=1.0)
    rows = whitened(2)  # (16, 15)
    floor = loss.at_perfection(16, 15)
    assert floor > 0.1
    assert loss(*rows).item() == pytest.approx(floor)
    assert loss(*(7 * z for z in rows)).item() == pytest.approx(floor)
    for _ in range(5):
        mixed = rows[0] @ torch.randn(15, 15, dtype=torch.float64)
        assert loss(mixed, mixed).item() > floor
    assert math.isnan(loss.value_at_perfection)


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_power_and_its_gradient(power: float) -> None:
    for values in ([0.5, 1.0, 2.0, 5.0], [1.0, 1.0, 2.0, 2.0], [1.0, 1.0 + 1e-9, 1.0 - 1e-9, 1.0]):
        matrix = covariance(values)
        exact = np.linalg.eigh(matrix.numpy())
        expected = exact.eigenvectors @ np.diag(exact.eigenvalues**-power) @ exact.eigenvectors.T
        torch.testing.assert_close(symmetric_power(matrix, power), torch.from_numpy(expected))
        leaf = matrix.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda m: symmetric_power((m + m.mT) / 2, power), (leaf,))


@pytest.mark.parametrize("power", [None, 0.45])
def test_both_axes_against_eigenvectors(power: float | None) -> None:
    for axis in ("features", "samples"):
        turned = [z.numpy() for z in well_conditioned((40, 6), 2)]  # observations in rows
        views = turned if axis == "features" else [z.T for z in turned]
        white = [naive_iter_norm(z) if power is None else naive_zca(z, power) for z in turned]
        trace = sum(((np.var(z, axis=0, ddof=1) - 1) ** 2).sum() for z in white)
        distance = naive_distance(*(white if axis == "features" else [z.T for z in white]))
        terms = spectral_transformation_terms(*map(torch.tensor, views), power=power, axis=axis)
        assert terms["trace"].item() == pytest.approx(trace)
        assert terms["invariance"].item() == pytest.approx(distance)


@pytest.mark.parametrize("axis", ["features", "samples"])
@pytest.mark.parametrize("power", [None, 0.5])
def test_collapse(axis: str, power: float | None) -> None:
    loss = SpectralTransformation(power=power, trace=0.1, axis=axis)
    constant = torch.arange(1.0, 5.0).expand(8, 4)
    assert loss(constant, constant).item() == pytest.approx(loss.at_collapse(8, 4), abs=1e-4)
    assert math.isnan(loss.value_at_collapse)


@pytest.mark.parametrize("loss", [SpectralTransformation(), SpectralTransformation(None, trace=1.0), INTL()])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_degenerate_batches_stay_finite(loss: SpectralTransformation, rank: int) -> None:
    rows = torch.randn(16, rank) @ torch.randn(rank, 8)
    for scale in (1e-3, 1.0, 500.0):
        views = [(scale * rows).requires_grad_(), (scale * torch.randn(16, 8)).requires_grad_()]
        loss(*views).backward()
        assert all(view.grad.isfinite().all() for view in views)
    flat = torch.full((8, 4), 3.0, requires_grad=True)
    loss(flat, flat).backward()
    assert flat.grad.isfinite().all()
    rows = torch.randn(16, 4).index_fill(0, torch.tensor([3]), torch.nan)
    assert loss(rows, rows).isnan()


def test_the_published_rule_of_intl() -> None:
    first, second = torch.randn(2, 64, 100, dtype=torch.float64)
    plain = spectral_transformation_terms(first, second, power=None, axis="samples")
    assert intl_terms(first, second)["trace"].item() == pytest.approx(3 * plain["trace"].item())
    assert INTL()(first, second).item() == pytest.approx(plain["invariance"].item() + 0.03 * plain["trace"].item())
    features = intl_terms(first, second, axis="features")  # log2 of 100 features
    other = spectral_transformation_terms(first, second, power=None, axis="features")
    assert features["trace"].item() == pytest.approx((math.log2(100) - 3) * other["trace"].item())
    assert INTL().at_perfection(256, 8192) == pytest.approx(0.05 * 2 * 209.6, abs=0.01)
    assert INTL().at_collapse(256, 8192) == pytest.approx(0.05 * 2 * 255**2 / 256)


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"`axis` must be one of \('features', 'samples'\), got 'rows'"):
        SpectralTransformation(axis="rows")
    for argument, rule in (("power", "positive"), ("iterations", "an integer of at least 1")):
        with pytest.raises(ValueError, match=f"`{argument}` must be {rule}, got 0"):
            SpectralTransformation(**{argument: 0})
    assert repr(SpectralTransformation()).endswith("(power=0.5, iterations=4, trace=0.0, axis='features')")
    assert repr(INTL()) == "INTL(iterations=4, trace=0.01, axis='samples')"
