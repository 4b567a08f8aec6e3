"""GOF (general orthogonal frame): neural collapse under imbalance, class means whose lengths follow the class sizes."""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import (
    in_input_precision,
    pair_blocks,
    present_rows,
    unit,
)
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision


@in_input_precision
def gof_error(means: Tensor, counts: Tensor | None = None, tile: int = 1024, sample: int | None = None) -> Tensor:
    r"""How far class means are from a general orthogonal frame: mean of :math:`|\cos(\mu_c, \mu_{c'})|` over pairs.

    The means are not centered: that would break the orthogonality. Where the largest class is more than twice the
    smallest read it beside the simplex measures of NC2. The mean absolute cosine as the distance is our choice.

    Args:
        means: Class means, or the rows of a classifier, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out.
        tile: Pairs are taken in blocks of ``tile * tile``.
        sample: Number of random pairs to take instead of all, the same in every call: for classes by the thousand.

    Returns:
        0-dimensional, 0 (orthogonal) to 1 (all on one line); ``1 / (C - 1)`` for a simplex; NaN for fewer than two
        classes or a mean at the origin.

    References:
        Dang et al., ICML 2023. https://arxiv.org/abs/2301.00437

    Example:
        >>> gof_error(torch.tensor([[5.0, 0.0], [0.0, 1.0]]))
        tensor(0.)
    """
    rows, present, _ = present_rows(means, counts)
    directions, (total, count) = unit(rows), rows.new_zeros(2).unbind()
    for block in pair_blocks(present, tile, sample):
        total = total + torch.where(block.pairs, block.products(directions).abs(), 0.0).sum()
        count = count + block.pairs.sum()
    return torch.where(count > 0, total / count, nan)


@in_input_precision
def norm_count_slope(means: Tensor, counts: Tensor) -> Tensor:
    r"""Exponent with which the length of class means follows the size of the class.

    The least-squares slope of :math:`\log \|\mu_c\|` on :math:`\log n_c`; ours, to see the imbalance of Dang et al.

    Args:
        means: Class means, or the rows of a classifier, shape ``(C, D)``; not centered here.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out.

    Returns:
        0-dimensional. In a collapsed bias-free model with little weight decay about ``1/4`` for the classifier and
        ``-1/4`` for the means; NaN if all classes are of one size; infinite or NaN for a mean at the origin.

    References:
        Dang et al., ICML 2023. https://arxiv.org/abs/2301.00437

    Example:
        >>> norm_count_slope(torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([10, 160]))
        tensor(0.2500)
    """
    rows, present, classes = present_rows(means, counts)
    size = torch.where(present, torch.where(present, counts, 1).to(rows).log(), 0.0)
    size = torch.where(present, size - size.sum() / classes, 0.0)
    length = torch.where(present, torch.linalg.vector_norm(rows, dim=1).log(), 0.0)
    spread = size.square().sum()
    # the rounding of the mean of equal logarithms is not a spread
    return torch.where(spread > classes * torch.finfo(rows.dtype).eps, (size * length).sum() / spread, nan)


class OrthogonalFrame(NamedTuple):
    """What theory predicts for each class, shape ``(C,)``.

    Attributes:
        weight: Squared length of the classifier's row.
        mean: Squared length of the class mean.
        collapsed: Boolean: minority collapse, both are exactly zero.
    """

    weight: Tensor
    mean: Tensor
    collapsed: Tensor


@full_precision
def orthogonal_frame(counts: Tensor, weight_decay: float, feature_decay: float) -> OrthogonalFrame:
    r"""Lengths of classifier rows and class means at the optimum of the unconstrained feature model.

    For the loss :math:`\frac{1}{2N} \|W H - Y\|^2 + \frac{\lambda_W}{2} \|W\|^2 + \frac{\lambda_H}{2} \|H\|^2` without
    a bias,

    .. math:: \|w_c\|^2 = \max\left(0, \sqrt{n_c \lambda_H / \lambda_W} - N \lambda_H\right), \quad
        \|\mu_c\|^2 = \max\left(0, \sqrt{\lambda_W / (n_c \lambda_H)} - N \lambda_W / n_c\right)

    and both vanish if and only if :math:`n_c \le N^2 \lambda_W \lambda_H`. Solved by us for this scaling of the loss;
    the paper has the orthogonality and the dependence on the class sizes.

    Args:
        counts: Rows of each class, shape ``(C,)``; a class without rows is collapsed.
        weight_decay: :math:`\lambda_W`, positive.
        feature_decay: :math:`\lambda_H`, positive.

    Returns:
        Squared lengths, in the precision sums are kept in, and which classes collapse.

    Raises:
        ValueError: If a decay is not positive.

    References:
        Dang et al., ICML 2023. https://arxiv.org/abs/2301.00437

    Example:
        >>> orthogonal_frame(torch.tensor([100, 50, 20, 5]), weight_decay=1e-2, feature_decay=1e-4).weight
        tensor([0.9825, 0.6896, 0.4297, 0.2061], dtype=torch.float64)
    """
    if not (weight_decay > 0 and feature_decay > 0):
        raise ValueError(
            f"`weight_decay` and `feature_decay` must be positive, got {weight_decay} and {feature_decay}."
        )
    n = counts.to(accumulation_dtype(counts.device))
    total, safe = n.sum(), n.clamp_min(torch.finfo(n.dtype).tiny)
    collapsed = n <= total.square() * weight_decay * feature_decay
    weight = (n * feature_decay / weight_decay).sqrt() - total * feature_decay
    mean = (weight_decay / (safe * feature_decay)).sqrt() - total * weight_decay / safe
    weight, mean = (torch.where(collapsed, 0.0, part.clamp_min(0)) for part in (weight, mean))
    return OrthogonalFrame(weight, mean, collapsed)
