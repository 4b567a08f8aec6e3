"""The Marchenko-Pastur law and what measures read from it."""

import math

import numpy as np
import pytest
from scipy import integrate

from lightning_collapse.functional import expected_under_isotropy
from lightning_collapse.functional.isotropic_null import marchenko_pastur_quantiles


@pytest.mark.parametrize(("n", "d"), [(100, 20), (100, 100), (20, 100), (1000, 999), (7, 3), (3, 7)])
def test_quantiles_are_eigenvalues_of_noise(n: int, d: int) -> None:
    found = marchenko_pastur_quantiles(n, d)
    assert found.shape == (min(n, d),)
    assert (np.diff(found) < 0).all()
    assert found.min() > 0
    edges = (1 - math.sqrt(d / n)) ** 2, (1 + math.sqrt(d / n)) ** 2
    assert edges[0] <= found.min() * (1 + 1e-9)
    assert found.max() <= edges[1] * (1 + 1e-9)
    # the trace of the covariance is d, that of its square d (1 + d / n)
    if min(n, d) >= 20:
        assert found.sum() == pytest.approx(d, rel=0.01)
        assert (found**2).sum() == pytest.approx(d * (1 + d / n), rel=0.02)


def test_quantiles_are_those_of_the_density() -> None:
    n, d = 400, 100
    ratio = d / n
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(x: float) -> float:
        return math.sqrt((high - x) * (x - low)) / (2 * math.pi * ratio * x)

    found = marchenko_pastur_quantiles(n, d)
    for i in (0, 10, 50, 90, 99):
        above, _ = integrate.quad(density, found[i], high)
        assert above == pytest.approx((i + 0.5) / d, abs=1e-3)


@pytest.mark.parametrize(("n", "d"), [(50, 200), (200, 200), (1000, 200)])
def test_participation_ratio_is_harmonic(n: int, d: int) -> None:
    assert expected_under_isotropy("participation_ratio", n, d) == pytest.approx(d / (1 + d / (n - 1)), rel=0.01)


def test_unbiased_null_is_the_truth() -> None:
    assert expected_under_isotropy("unbiased_participation_ratio", 10, 50) == 50
    assert math.isnan(expected_under_isotropy("unbiased_participation_ratio", 3, 50))


@pytest.mark.parametrize(
    "name", ["feature_std", "feature_std_floor", "dead_dimensions", "alignment", "relative_spread"]
)
def test_no_null(name: str) -> None:
    assert math.isnan(expected_under_isotropy(name, 100, 10))


@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 5), (3, 1), (5, 5), (6, 5), (100000, 2), (2, 4096)])
@pytest.mark.parametrize("name", ["effective_rank", "rankme", "numerical_rank", "condition_number", "top_k_share"])
def test_odd_shapes(name: str, n: int, d: int) -> None:
    assert expected_under_isotropy(name, n, d) >= (0 if name == "top_k_share" else 0.999)


def test_unknown_measure() -> None:
    with pytest.raises(ValueError, match="Unknown measure 'nothing'"):
        expected_under_isotropy("nothing", 10, 10)
