"""GNC2 (generalized NC2): how evenly class means spread over the sphere, for more classes than dimensions."""

from __future__ import annotations

from math import log, nan
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import CenteredMeans, centered_means, pair_blocks, unit
from lightning_collapse.spectral.precision import full_precision


class LogKernel(NamedTuple):
    """Logarithmic kernel over all pairs of classes; both 0-dimensional.

    Attributes:
        mean: ``-log(2 C / (C - 1)) / 2`` for a simplex, about -0.3466 for many classes.
        variance: 0 for a simplex.
    """

    mean: Tensor
    variance: Tensor


@full_precision
def gnc2(
    means: Tensor,
    counts: Tensor | None = None,
    global_mean: Tensor | None = None,
    tile: int = 1024,
    sample: int | None = None,
) -> LogKernel:
    r"""Hyperspherical uniformity of class means.

    .. math:: k(c, c') = \log \frac{1}{\|\hat m_c - \hat m_{c'}\|}, \quad
        \hat m_c = \frac{\mu_c - \mu_G}{\|\mu_c - \mu_G\|}

    Its variance over the pairs falls towards 0 as the means spread evenly, also where more classes than ``D + 1`` allow
    no simplex. Directions that coincide count as 1e-8 apart.

    Args:
        means: Class means, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out.
        global_mean: Shape ``(D,)``; the mean of the class means by default.
        tile: Pairs are taken in blocks of ``tile * tile``.
        sample: Number of random pairs to take instead of all, the same in every call: for classes by the thousand.

    Returns:
        Mean, and variance (divided by the number of pairs; about ``1 / (4 D)`` for isotropic directions), at least
        ``float32``; NaN for fewer than two classes or where a class mean is the global mean and has no direction.

    References:
        Wu, Papyan, *Linguistic Collapse*, NeurIPS 2024. https://arxiv.org/abs/2405.17767

    Example:
        >>> gnc2(torch.tensor([[5.0, 0.0], [-1.0, 0.0]]))
        LogKernel(mean=tensor(-0.6931), variance=tensor(0.))
    """
    dtype = torch.promote_types(means.dtype, torch.float32)
    found = log_kernel(centered_means(means, counts, global_mean), tile, sample)
    return LogKernel(found.mean.to(dtype), found.variance.to(dtype))


def log_kernel(part: CenteredMeans, tile: int = 1024, sample: int | None = None) -> LogKernel:
    """:func:`gnc2` of class means that are centered already."""
    rows, present, _ = part
    directions = unit(rows)
    # about the value of a simplex, which the mean comes near: the variance does not drown in it
    anchor = -0.5 * log(2 * len(rows) / max(len(rows) - 1, 1))
    total, square, count = rows.new_zeros(3).unbind()
    for block in pair_blocks(present, tile, sample):
        distance = (2 - 2 * block.products(directions)).clamp_min(1e-16)
        value = torch.where(block.pairs, -0.5 * distance.log() - anchor, 0.0)
        total, square, count = total + value.sum(), square + value.square().sum(), count + block.pairs.sum()
    mean = torch.where(count > 0, total / count, nan)
    return LogKernel(mean + anchor, torch.where(count > 0, (square / count - mean.square()).clamp_min(0), nan))
