"""Marchenko-Pastur fit: what of a weight spectrum is not that of a random matrix."""

from functools import lru_cache
from math import hypot, pi, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_collapse.functional.isotropic_null import marchenko_pastur_quantiles
from lightning_collapse.spectral.precision import full_precision

MARGIN = 6.0
"""Deviations above the edge before a value is an outlier: 2 of 100 000 Gaussian 16 x 16 matrices had one."""


class MarchenkoPasturFit(NamedTuple):
    """A spectrum next to that of a random matrix of the same shape.

    Attributes:
        variance: Robust estimate of the variance of the random part of an element.
        edge: Singular values above this one are outliers.
        outlier_count: How many there are; 0 for a random matrix.
        outlier_share: Their share of all singular values, 0 to 1.
        ks_distance: Kolmogorov-Smirnov distance of all eigenvalues to the Marchenko-Pastur law, 0 to 1; about
            ``3 / K`` for a random matrix.
    """

    variance: Tensor
    edge: Tensor
    outlier_count: Tensor
    outlier_share: Tensor
    ks_distance: Tensor


@torch.no_grad()
@full_precision
def marchenko_pastur_fit(singular_values: Tensor, shape: tuple[int, int]) -> MarchenkoPasturFit:
    r"""Fit the Marchenko-Pastur law to a weight matrix and count the singular values that noise cannot explain.

    Independent elements of variance :math:`s^2` in a matrix of :math:`n \ge d` give eigenvalues :math:`\sigma^2 / n`
    between :math:`s^2 (1 \pm \sqrt{d / n})^2`, whatever the distribution of the elements, as long as it has a few
    moments: initialisations do. The variance comes from the median eigenvalue, which outliers do not move until they
    are half of all. The largest of a finite matrix fluctuates about the edge with the Tracy-Widom law, at centre and
    scale

    .. math::
        \mu = (\sqrt{n - \tfrac12} + \sqrt{d - \tfrac12})^2, \quad
        \tau = \sqrt{\mu}\, \Big(\frac{1}{\sqrt{n - \tfrac12}} + \frac{1}{\sqrt{d - \tfrac12}}\Big)^{1/3},

    and the estimate of :math:`s^2` has a relative deviation of about :math:`2.5 / \sqrt{n d}` (measured). What exceeds
    the centre by six times both deviations, added in squares, is an outlier. Nothing waits for the device.

    Args:
        singular_values: Of the matrix as it is, descending, shape ``(..., K)`` with ``K = min(shape)``.
        shape: Rows and columns of the matrix.

    Returns:
        Five tensors of shape ``(...)``. Where more than half of the singular values are zero the variance is zero, all
        others are outliers, and the distance is NaN; where one is NaN or infinite all are NaN.

    Raises:
        ValueError: If ``shape`` does not have ``K`` as its smaller side.

    References:
        Marchenko & Pastur, *Distribution of eigenvalues for some sets of random matrices*, 1967.
        Gavish & Donoho, *The optimal hard threshold for singular values is 4/sqrt(3)*, 2014 (scale from the median).
        https://arxiv.org/abs/1305.5870
        Johnstone, *On the distribution of the largest eigenvalue in principal components analysis*, 2001, with the
        centring of Ma, *Accuracy of the Tracy-Widom limits*, 2012. https://arxiv.org/abs/1203.0839

    Example:
        >>> noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        >>> spike = torch.outer(torch.ones(64), torch.ones(256)) / 5
        >>> values = torch.linalg.svdvals(torch.stack([noise, noise + spike]))
        >>> marchenko_pastur_fit(values, (64, 256)).outlier_count
        tensor([0., 1.])
    """
    size = singular_values.shape[-1]
    if min(shape) != size:
        raise ValueError(f"`shape` must have {size}, the number of singular values, as its smaller side, got {shape}.")
    if not size:
        none = singular_values.new_full(singular_values.shape[:-1], torch.nan)
        return MarchenkoPasturFit(none, none, none, none, none)
    n, d = max(shape), min(shape)
    values = singular_values if singular_values.device.type == "mps" else singular_values.double()
    energy = values.square() / n
    variance = energy.quantile(0.5, dim=-1) / _median(n, d)
    long, short = sqrt(n - 0.5), sqrt(d - 0.5)
    centre, scale = (long + short) ** 2, (long + short) * (1 / long + 1 / short) ** (1 / 3)
    ceiling = (centre + MARGIN * hypot(scale, centre * 2.5 / sqrt(n * d))) / n
    count = (energy > (ceiling * variance).unsqueeze(-1)).sum(dim=-1).to(values.dtype)
    law = marchenko_pastur_cdf(energy / variance.unsqueeze(-1), d / n)
    below = torch.arange(d - 1, -1, -1, device=values.device, dtype=values.dtype) / d
    distance = torch.maximum((law - below).abs(), (law - below - 1 / d).abs()).amax(dim=-1)
    finite = values.sum(dim=-1).isfinite()
    results = (variance, (n * ceiling * variance).sqrt(), count, count / d, distance)
    return MarchenkoPasturFit(*(torch.where(finite, x, torch.nan).to(singular_values.dtype) for x in results))


def marchenko_pastur_cdf(x: Tensor, ratio: float) -> Tensor:
    r"""Distribution function of the Marchenko-Pastur law for elements of unit variance.

    Args:
        x: Eigenvalues, any shape.
        ratio: :math:`y = d / n`, in ``(0, 1]``.

    Returns:
        Same shape, 0 to 1.

    Raises:
        ValueError: If ``ratio`` is not in ``(0, 1]``.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"`ratio` must be in (0, 1], got {ratio}. Divide the smaller side by the larger.")
    low, high = (1 - sqrt(ratio)) ** 2, (1 + sqrt(ratio)) ** 2
    above, below = (high - x).clamp_min(0), (x - low).clamp_min(0)
    root = (above * below).sqrt()
    arc = torch.atan2(above - below, 2 * root)
    far = torch.atan2(low * above - high * below, 2 * (1 - ratio) * root)
    inside = 0.5 + (root - (1 + ratio) * arc + (1 - ratio) * far) / (2 * pi * ratio)
    inside = torch.where(x <= low, 0.0, torch.where(x >= high, 1.0, inside))
    return torch.where(x.isnan(), torch.nan, inside.clamp(0, 1))


@lru_cache(maxsize=4096)
def _median(n: int, d: int) -> float:
    return float(np.median(marchenko_pastur_quantiles(n, d)))
