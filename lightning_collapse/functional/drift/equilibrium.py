"""Equilibrium of a curve: whether it returns to a level (an autoregression of order 1), to which, and how fast."""

from math import inf, log, nan
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 50
"""Points below which nothing is claimed."""


class Equilibrium(NamedTuple):
    r"""What :func:`equilibrium` returns, shape ``(...)`` each.

    Attributes:
        phi: Autocorrelation, corrected for the bias of so few points.
        level: Where the curve returns to, :math:`c / (1 - \hat\phi)`; NaN if it is not ``bounded``.
        error: Standard error of the level.
        half_life: Points in which half of a deviation is gone; infinity for ``phi`` of 1 or more, which alone means
            nothing; NaN if it is not ``bounded``.
        statistic: Of Dickey and Fuller: :math:`\hat\phi - 1` over its standard error.
        bounded: Whether a unit root is rejected at 5 %: a random walk passes for bounded in one of twenty fits.
    """

    phi: Tensor
    level: Tensor
    error: Tensor
    half_life: Tensor
    statistic: Tensor
    bounded: Tensor


def equilibrium(curve: Tensor) -> Equilibrium:
    r"""Fit an autoregression by least squares; its bias is taken out by :math:`(n \hat\phi + 1) / (n - 3)`.

    .. math:: D_{t+1} = c + \phi D_t + \varepsilon

    Leave the transient out. Of fewer than 50 points, and of constant ones, nothing is bounded.

    Args:
        curve: ``(..., n)``, four or more; a NaN makes its curve NaN.

    Returns:
        Level, half-life and the test of a unit root.

    References:
        Dickey & Fuller, 1979; Marriott & Pope, 1954, for the bias; MacKinnon, 1991, for the limit.

    Example:
        >>> noise = torch.randn(200, generator=torch.Generator().manual_seed(0))
        >>> bool(equilibrium(noise).bounded), bool(equilibrium(noise.cumsum(0)).bounded)
        (True, False)
    """
    curve = curve if curve.dtype == torch.float64 or curve.device.type == "mps" else curve.double()
    n, before, after = curve.shape[-1], curve[..., :-1], curve[..., 1:]
    mean, mean_after = before.mean(dim=-1), after.mean(dim=-1)
    centered = before - mean.unsqueeze(-1)
    square = centered.square().sum(dim=-1)
    phi = (centered * after).sum(dim=-1) / square
    left = after - mean_after.unsqueeze(-1) - phi.unsqueeze(-1) * centered
    statistic = (phi - 1) / (left.square().sum(dim=-1) / (n - 3) / square).sqrt()
    bounded = (statistic < dickey_fuller_limit(n)) & (n >= LEAST) & statistic.isfinite()
    corrected = (n * phi + 1) / (n - 3)
    level = (mean_after - phi * mean) / (1 - phi)
    error = curve.std(dim=-1) * ((1 + corrected) / ((1 - corrected).clamp_min(0) * n)).clamp_min(0).sqrt()
    # what is not above 0 is gone within a point
    half_life = torch.where(corrected < 1, log(0.5) / corrected.clamp(1e-12, 1 - 1e-12).log(), inf)
    level, error, half_life = (torch.where(bounded, value, nan) for value in (level, error, half_life))
    return Equilibrium(corrected, level, error, half_life, statistic, bounded)


def dickey_fuller_limit(n: int) -> float:
    r"""Value below which a unit root is rejected at 5 %, :math:`-2.8621 - 2.738/T - 8.36/T^2` with :math:`T = n - 1`.

    Example:
        >>> [round(dickey_fuller_limit(n), 2) for n in (50, 100, 250)]
        [-2.92, -2.89, -2.87]
    """
    return -2.8621 - 2.738 / (n - 1) - 8.36 / (n - 1) ** 2
