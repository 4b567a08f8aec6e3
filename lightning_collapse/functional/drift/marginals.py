"""Kolmogorov-Smirnov and Wasserstein distances of two samples in one dimension, along any number of directions."""

from math import exp, log, pi, sqrt

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision

_KS_MEAN = sqrt(pi / 2) * log(2)
_W1_MEAN = 1.2883791878
"""Of :math:`\\sqrt{2/\\pi} \\int \\sqrt{\\Phi (1 - \\Phi)}`."""


@full_precision
def kolmogorov_smirnov(x: Tensor, y: Tensor) -> Tensor:
    r"""Largest difference of two empirical distribution functions, :math:`\sup |F - G|`.

    Args:
        x: Sorted, ``(..., n)``: of each direction the projections of the rows of one sample.
        y: Sorted, ``(..., m)``.

    Returns:
        ``(...)``, 0 to 1; :math:`2 \Phi(\delta/2) - 1` of normal numbers shifted by :math:`\delta` deviations.

    Example:
        >>> kolmogorov_smirnov(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0, 3.0, 4.0]))
        tensor(0.7500)
    """
    return _difference(x, y)[1].amax(dim=-1)


@full_precision
def wasserstein1(x: Tensor, y: Tensor) -> Tensor:
    r"""First Wasserstein distance, :math:`\int |F - G|`: what it takes to move one sample onto the other.

    Args:
        x: Sorted, ``(..., n)``.
        y: Sorted, ``(..., m)``.

    Returns:
        ``(...)``, 0 to infinity; :math:`|\delta|` of a sample shifted by :math:`\delta`.

    Example:
        >>> wasserstein1(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]))
        tensor(2.)
    """
    values, apart = _difference(x, y)
    return (apart[..., :-1] * values.diff(dim=-1)).sum(dim=-1)


def ks_null(n: int, m: int) -> float:
    """Mean of :func:`kolmogorov_smirnov` for two samples of one continuous law, for many rows.

    Example:
        >>> round(ks_null(1000, 1000), 4)
        0.0389
    """
    return _KS_MEAN * sqrt(1 / n + 1 / m)


def ks_p_value(statistic: float, n: int, m: int, directions: int = 1) -> float:
    r"""Probability of a largest distance along several directions like this or above for two samples of one law.

    .. math:: \min\Big(1,\ k \cdot 2 \sum_{i \ge 1} (-1)^{i-1} e^{-2 i^2 \lambda^2}\Big), \qquad
        \lambda = \sup |F - G| \sqrt{nm / (n + m)}

    Args:
        statistic: The largest of the distances.
        n: Rows of one sample, all independent.
        m: Rows of the other.
        directions: :math:`k`, for Bonferroni's bound.

    References:
        Smirnov, *Table for estimating the goodness of fit of empirical distributions*, 1948.

    Example:
        >>> round(ks_p_value(1.358 * (2 / 1000) ** 0.5, 1000, 1000), 3)
        0.05
    """
    scaled = statistic * sqrt(n * m / (n + m))
    if scaled < 0.2:  # where the series does not settle, and is 1
        return 1.0
    tail: float = 2 * sum((-1) ** (i - 1) * exp(-2 * (i * scaled) ** 2) for i in range(1, 31))
    return min(1.0, directions * tail)


def wasserstein1_null(n: int, m: int, deviation: float = 1.0) -> float:
    """Mean of :func:`wasserstein1` for two normal samples of one standard deviation.

    Example:
        >>> round(wasserstein1_null(1000, 1000), 4)
        0.0576
    """
    return _W1_MEAN * deviation * sqrt(1 / n + 1 / m)


def _difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All values in order, and between each and the next the difference of the distribution functions."""
    values = torch.cat([x, y], dim=-1).sort(dim=-1).values
    f, g = (torch.searchsorted(of.contiguous(), values, right=True).to(of.dtype) / of.shape[-1] for of in (x, y))
    return values, (f - g).abs()
