"""The random projection: what it keeps and what it leaves alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import (
    effective_rank,
    feature_std,
    isotropy,
    participation_ratio,
    unbiased_participation_ratio,
)
from lightning_collapse.spectral import GaussianSketch, Spectrum, spectrum_of
from lightning_collapse.utilities.registry import MEASURES

DIM, SIZE, ROWS = 200, 128, 100


def features(exponent: float, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, dim, generator=generator) * torch.arange(1.0, dim + 1) ** (-exponent / 2)


@cache
def records(exponent: float) -> list[tuple[Spectrum, Spectrum]]:
    """Of projections, one per width, and of the features themselves."""
    wide = [features(exponent, dim) for dim in range(DIM, DIM + 12)]
    return [(replace(spectrum_of(GaussianSketch(x.shape[1], SIZE)(x)), sketched=True), spectrum_of(x)) for x in wide]


def bias(measure: Callable[[Spectrum], Tensor], exponent: float, corrected: bool = True) -> float:
    """Mean ratio of the value of a projection to that of the features."""
    pairs = [(replace(sketch, sketched=corrected), truth) for sketch, truth in records(exponent)]
    return torch.stack([measure(sketch) / measure(truth) for sketch, truth in pairs]).mean().item()


def test_it_is_the_same_every_time() -> None:
    first, second = GaussianSketch(16, 4), GaussianSketch(16, 4)
    assert torch.equal(first.matrix, second.matrix)
    assert first.matrix.shape == (16, 4)
    assert not torch.equal(GaussianSketch(17, 4).matrix[:16], first.matrix)


def test_the_global_random_state_is_untouched() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    sketch = GaussianSketch(16, 4)
    sketch(torch.ones(2, 16))
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(4)
    assert torch.equal(GaussianSketch(16, 4).matrix, sketch.matrix)


def test_default_dtype_and_device_do_not_change_it() -> None:
    expected = GaussianSketch(16, 4).matrix
    torch.set_default_dtype(torch.float64)
    try:
        in_double = GaussianSketch(16, 4).matrix
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(in_double.float(), expected)
    with torch.device("meta"):  # as torch.set_default_device does
        assert torch.equal(GaussianSketch(16, 4, device="cpu").matrix, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    sketch, x = GaussianSketch(16, 4), torch.randn(5, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sketch(x)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(y, x.to(y.dtype) @ sketch.matrix.to(y.dtype), rtol=0, atol=0)


def test_the_mean_variance_is_kept() -> None:
    x = features(0.0)
    assert feature_std(GaussianSketch(DIM, SIZE)(x)).item() == pytest.approx(feature_std(x).item(), rel=0.02)


def test_moments_behind_the_correction() -> None:
    # means over projections: tr S_y^2 = (1 + 1/k) tr S^2 + (tr S)^2 / k and (tr S_y)^2 = (tr S)^2 + 2 tr S^2 / k
    k, eigenvalues = 6, torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    omega = torch.randn(40000, 8, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / k**0.5
    covariances = omega.transpose(1, 2) @ (eigenvalues.unsqueeze(1) * omega)
    square, trace2 = eigenvalues.square().sum().item(), eigenvalues.sum().item() ** 2
    assert covariances.square().sum(dim=(1, 2)).mean().item() == pytest.approx(
        float((1 + 1 / k) * square + trace2 / k), rel=0.01
    )
    traces = covariances.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert traces.square().mean().item() == pytest.approx(trace2 + 2 * square / k, rel=0.01)


def test_the_correction_solves_for_the_moments() -> None:
    k = 64
    values = torch.arange(1, k + 1, dtype=torch.float64) ** -0.25
    of_sketch = values.pow(4).sum().item(), values.square().sum().square().item()
    square, trace2 = torch.linalg.solve(
        torch.tensor([[1 + 1 / k, 1 / k], [2 / k, 1]]), torch.tensor(of_sketch)
    ).tolist()
    found = participation_ratio(Spectrum(values, torch.tensor(1000.0), k, sketched=True)).item()
    assert found == pytest.approx(trace2 / square, rel=2e-3)  # of second order in 1 / k, a hundredth of the correction


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_participation_ratio_is_debiased(exponent: float) -> None:
    assert bias(participation_ratio, exponent) == pytest.approx(1, abs=0.04)


def test_without_the_correction_it_is_biased() -> None:
    assert bias(participation_ratio, 0.0, corrected=False) < 0.7
    assert bias(participation_ratio, 0.5, corrected=False) < 0.8


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_unbiased_participation_ratio_is_debiased(exponent: float) -> None:
    assert bias(unbiased_participation_ratio, exponent) == pytest.approx(1, abs=0.04)


def test_isotropy_is_not_read_from_a_projection() -> None:
    # the debiased ratio is that of the features, the width that of the projection
    assert all(isotropy(sketch) > 1.3 * isotropy(truth) for sketch, truth in records(0.0))
    assert not MEASURES["isotropy"].sketchable


def test_entropic_ranks_do_not_exceed_the_width() -> None:
    assert all(effective_rank(sketch) <= SIZE for sketch, _ in records(0.0))
