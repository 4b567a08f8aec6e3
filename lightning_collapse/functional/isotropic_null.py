"""Isotropic null: what a measure reads of isotropic noise with the same number of rows and features."""

from __future__ import annotations

from functools import lru_cache
from math import nan

import numpy as np
import torch

from lightning_collapse.spectral.spectrum import Spectrum
from lightning_collapse.utilities.registry import Measure, get_measure


def expected_under_isotropy(measure: str, n: int, d: int) -> float:
    r"""Expected reading of a measure on ``n`` rows of ``d``-dimensional isotropic Gaussian noise.

    A rank read from few rows is low whatever the representation: 64 rows of 128-dimensional noise have an effective
    rank of 59. Compare a reading with this number, not with ``d``. For spectral measures the value on the quantiles of
    the Marchenko-Pastur law with ratio :math:`d / (n - 1)`; for others what their registration says.

    Args:
        measure: Name of a registered measure.
        n: Number of rows.
        d: Number of features.

    Returns:
        The expectation; NaN where the measure has none (scale-dependent ones) or ``n < 2``.

    Raises:
        ValueError: If there is no such measure.

    References:
        Marchenko & Pastur, *Distribution of eigenvalues for some sets of random matrices*, 1967.

    Example:
        >>> round(expected_under_isotropy("participation_ratio", n=512, d=256), 1)  # about d / (1 + d / n)
        170.5
    """
    return _expected(get_measure(measure), n, d)


@lru_cache(maxsize=4096)
def _expected(measure: Measure, n: int, d: int) -> float:
    if n < 2:
        return nan
    if measure.null is not None:
        return measure.null(n, d)
    if measure.kind != "spectrum":
        return nan
    # centering costs one degree of freedom
    rows = n - 1 if measure.spectrum == "centered" else n
    values = torch.from_numpy(np.sqrt(rows * marchenko_pastur_quantiles(rows, d)))
    return float(measure.of_spectrum(Spectrum(values, torch.tensor(float(n), dtype=torch.float64), d)))


def marchenko_pastur_quantiles(n: int, d: int, grid: int = 4096) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    r"""Expected covariance eigenvalues of ``n`` rows of unit-variance noise, by quantiles of their limiting law.

    Args:
        n: Degrees of freedom.
        d: Number of features.
        grid: Points of the numerical integration.

    Returns:
        Descending, shape ``(min(n, d),)``: the eigenvalues that are not zero.
    """
    ratio, size = d / n, min(n, d)
    # the non-zero eigenvalues of the larger side are those of the smaller, rescaled
    y = min(ratio, 1 / ratio)
    low, high = (1 - y**0.5) ** 2, (1 + y**0.5) ** 2
    # x = low + (high - low) sin^2(angle) removes the square-root singularities at both ends
    angle = (np.arange(grid) + 0.5) * np.pi / (2 * grid)
    x = low + (high - low) * np.sin(angle) ** 2
    density = np.sqrt((high - x) * (x - low)) / x * (high - low) * np.sin(2 * angle)
    cumulative = np.cumsum(density) / density.sum()
    quantiles = np.interp((np.arange(size) + 0.5) / size, cumulative, x)[::-1]
    return np.ascontiguousarray(quantiles * max(ratio, 1.0))
