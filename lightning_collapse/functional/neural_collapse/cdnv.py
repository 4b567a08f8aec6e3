"""CDNV (class-distance normalized variance): neural collapse pair by pair, without a covariance."""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import CenteredMeans, centered_means, pair_blocks
from lightning_collapse.spectral.precision import full_precision

SHIFT = 12  # bits of the significand dropped in the histogram of pairs: 11 stay


class Cdnv(NamedTuple):
    """Class-distance normalized variance over all pairs of classes; every field 0-dimensional.

    Attributes:
        mean: Mean over resolved pairs; dominated by the closest ones.
        median: Lower median over all pairs, unresolved ones as infinity.
        mean_log: Mean of the natural logarithm over resolved pairs (not the logarithm of the mean).
        pairs: Number of pairs, ``int64``.
        unresolved: Pairs whose means cannot be told apart from one another, left out of the means,
            ``int64``.
    """

    mean: Tensor
    median: Tensor
    mean_log: Tensor
    pairs: Tensor
    unresolved: Tensor


@full_precision
def cdnv(
    means: Tensor,
    variances: Tensor,
    counts: Tensor | None = None,
    debiased: bool = False,
    tile: int = 1024,
    sample: int | None = None,
) -> Cdnv:
    r"""Class-distance normalized variance.

    .. math:: V(c, c') = \frac{\operatorname{Var}_c + \operatorname{Var}_{c'}}{2 \|\mu_c - \mu_{c'}\|^2}, \quad
        \operatorname{Var}_c = E \|x - \mu_c\|^2

    Falls towards 0 as features collapse onto their class means. With estimated means the distance is too large by
    :math:`\operatorname{Var}_c / n_c + \operatorname{Var}_{c'} / n_{c'}`, so that features without any class structure
    read about ``(n_c - 1) / 2``: compare at one number of rows per class, or ask for the debiased form, which takes
    unbiased variances and subtracts these terms (ours, not from the paper). There a pair whose distance is not above
    its noise is unresolved.

    Args:
        means: Class means, shape ``(C, D)``.
        variances: :math:`\operatorname{Var}_c`, summed over the features and divided by ``n_c``, shape ``(C,)``.
        counts: Rows of each class ``n_c``, shape ``(C,)``; classes without rows are left out, and with ``debiased``
            those with one row.
        debiased: See above.
        tile: Pairs are taken in blocks of ``tile * tile``, so that thousands of classes need no ``C x C`` matrix. The
            median of more than ``tile`` classes is right to one part in 4000.
        sample: Number of random pairs to take instead of all, the same in every call: for classes by the thousand.

    Returns:
        The means, 0 (collapsed) to infinity, NaN for no resolved pair, and counts; at least ``float32``.

    Raises:
        ValueError: If a shape does not fit, or ``debiased`` is asked for without ``counts``.

    References:
        Galanti, Gyorgy, Hutter, ICLR 2022. https://arxiv.org/abs/2112.15121

    Example:
        >>> cdnv(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.5, 1.5])).mean
        tensor(0.2500)
    """
    if variances.shape != means.shape[:1]:
        raise ValueError(f"`variances` must have shape ({len(means)},), got {tuple(variances.shape)}.")
    if debiased and counts is None:
        raise ValueError("`debiased` needs `counts`, the number of rows of each class.")
    dtype = torch.promote_types(means.dtype, torch.float32)
    if debiased and counts is not None:
        counts = torch.where(counts > 1, counts, 0)
    rows, present, classes = centered_means(means, counts)
    variances = torch.where(present, variances.to(rows), 0.0)
    noise = torch.zeros_like(variances)
    if debiased and counts is not None:
        n = counts.to(rows)
        variances = variances * n / (n - 1).clamp_min(1)
        noise = variances / n.clamp_min(1)
    found = over_pairs(CenteredMeans(rows, present, classes), variances, noise, tile, sample)
    return found._replace(mean=found.mean.to(dtype), median=found.median.to(dtype), mean_log=found.mean_log.to(dtype))


def over_pairs(
    part: CenteredMeans, variances: Tensor, noise: Tensor, tile: int = 1024, sample: int | None = None
) -> Cdnv:
    """:func:`cdnv` of class means that are centered already, with what is to be subtracted for each class."""
    rows, present, _ = part
    square = rows.square().sum(dim=1)
    total, total_log = rows.new_zeros(2).unbind()
    pairs, unresolved = torch.zeros(2, dtype=torch.int64, device=rows.device).unbind()
    several = len(rows) > tile and sample is None
    histogram = torch.zeros(1 << (31 - SHIFT), dtype=torch.int64, device=rows.device) if several else None
    median = rows.new_full((), nan)
    for block in pair_blocks(present, tile, sample):
        pair, scale = block.pairs, block.sums(square)
        distance = scale - 2 * block.products(rows) - block.sums(noise)
        apart = distance > 16 * torch.finfo(rows.dtype).eps * scale
        apart |= distance.isnan()  # a bad number is not a coincidence
        value = block.sums(variances) / (2 * torch.where(apart, distance, 1.0))
        total = total + torch.where(pair & apart, value, 0.0).sum()
        total_log = total_log + torch.where(pair & apart, value.log(), 0.0).sum()
        pairs, unresolved = pairs + pair.sum(), unresolved + (pair & ~apart).sum()
        value = torch.where(apart, value, torch.inf)
        if histogram is None:
            median = torch.where(pair, value, nan).flatten().nanmedian()
        else:
            # the leading bits of positive floats are in the order of the floats
            bins = value.float().view(torch.int32).bitwise_and(0x7FFFFFFF) >> SHIFT
            histogram.scatter_add_(0, bins.flatten().long(), pair.flatten().long())
    resolved = pairs - unresolved
    mean, mean_log = (torch.where(resolved > 0, sum_ / resolved, nan) for sum_ in (total, total_log))
    if histogram is not None:
        median = _median(histogram).to(rows)
    median = torch.where((pairs > 0) & ~total.isnan(), median, nan)
    return Cdnv(mean, median, mean_log, pairs, unresolved)


def _median(histogram: Tensor) -> Tensor:
    """Middle of the bin that holds the lower median; bins are leading bits of positive ``float32``."""
    cumulative = histogram.cumsum(dim=0)
    bits = torch.searchsorted(cumulative, (cumulative[-1:] + 1) // 2) << SHIFT
    middle = (bits + (1 << (SHIFT - 1))).int().view(torch.float32).squeeze(0)
    first = bits.int().view(torch.float32).squeeze(0)
    # zero and infinity are values and not the middle of anything
    return torch.where((first == 0) | first.isinf(), first, middle)
