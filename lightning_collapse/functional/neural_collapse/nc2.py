"""NC2: how near class means, or the rows of a classifier, are to a simplex equiangular tight frame."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import (
    CenteredMeans,
    centered_means,
    in_input_precision,
    pair_blocks,
    present_rows,
    unit,
)
from lightning_collapse.spectral.eigenvalues import safe_sqrt


@in_input_precision
def nc2_equinorm(
    means: Tensor, counts: Tensor | None = None, global_mean: Tensor | None = None, center: bool = True
) -> Tensor:
    r"""How unequal the lengths of the centered class means are.

    .. math:: \operatorname{std}_c \|\mu_c - \mu_G\| \,/\, \operatorname{mean}_c \|\mu_c - \mu_G\|

    with the unbiased standard deviation of the authors' code.

    Args:
        means: Class means, or the rows of a classifier, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out.
        global_mean: Shape ``(D,)``; the mean of the class means by default.
        center: Subtract it; ``False`` for the rows of a classifier, as published.

    Returns:
        0-dimensional, 0 (collapsed: equal lengths) to the root of ``C``; NaN for fewer than two classes or no lengths.

    References:
        Papyan, Han, Donoho, PNAS 2020. https://arxiv.org/abs/2008.08186

    Example:
        >>> nc2_equinorm(torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, 0.0]]), center=False)
        tensor(0.)
    """
    return norm_variation(centered_means(means, counts, global_mean) if center else present_rows(means, counts))


@in_input_precision
def nc2_equiangular(
    means: Tensor,
    counts: Tensor | None = None,
    global_mean: Tensor | None = None,
    center: bool = True,
    tile: int = 1024,
) -> Tensor:
    r"""How far the angles between centered class means are from those of a simplex.

    .. math:: \operatorname{mean}_{c \ne c'} \left| \cos(\mu_c - \mu_G,\, \mu_{c'} - \mu_G) + \tfrac{1}{C - 1} \right|

    Args:
        means: Class means, or the rows of a classifier, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out.
        global_mean: Shape ``(D,)``; the mean of the class means by default.
        center: Subtract it; ``False`` for the rows of a classifier, as published.
        tile: Pairs are taken in blocks of ``tile * tile``.

    Returns:
        0-dimensional, 0 (collapsed) to ``1 + 1 / (C - 1)``; NaN for fewer than two classes, or where a class mean is
        the global mean and has no direction.

    References:
        Papyan, Han, Donoho, PNAS 2020. https://arxiv.org/abs/2008.08186

    Example:
        >>> nc2_equiangular(torch.tensor([[5.0, 0.0], [-1.0, 0.0]]))
        tensor(0.)
    """
    return angle_error(centered_means(means, counts, global_mean) if center else present_rows(means, counts), tile)


@in_input_precision
def etf_error(
    rows: Tensor, counts: Tensor | None = None, global_mean: Tensor | None = None, center: bool = True
) -> Tensor:
    r"""Distance of a Gram matrix from that of a simplex equiangular tight frame.

    .. math:: \left\| \frac{G}{\|G\|_F} - \frac{I - \mathbf 1 \mathbf 1^\top / C}{\sqrt{C - 1}} \right\|_F,
        \quad G = M M^\top

    The rows of :math:`M` are the centered class means, or, with ``center=False``, the rows of the classifier [1]. More
    classes than ``D + 1`` fit no simplex: compare with :func:`etf_error_floor`.

    Args:
        rows: Class means, or the weight of a classifier, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out.
        global_mean: Shape ``(D,)``; the mean of the class means by default.
        center: Subtract it; ``False`` for the weight of a classifier, as published.

    Returns:
        0-dimensional, 0 (collapsed) to 2, at most the root of 2 for centered rows; NaN for fewer than two classes or
        nothing but zeros. Above ``C = D + 1`` right to about 1e-8, where it cannot be near 0.

    References:
        [1] Zhu et al., NeurIPS 2021. https://arxiv.org/abs/2105.02375

    Example:
        >>> etf_error(torch.tensor([[5.0, 0.0], [-1.0, 0.0]])) < 1e-12
        tensor(True)
    """
    part = centered_means(rows, counts, global_mean) if center else present_rows(rows, counts)
    return frame_distance(part.rows, part.rows, part.present)


def etf_error_floor(num_classes: int, dim: int) -> float:
    r"""The least :func:`etf_error` that ``C`` class means in ``D`` dimensions can have.

    .. math:: \sqrt{2 - 2 \sqrt{D / (C - 1)}} \quad (C > D + 1), \qquad 0 \quad (C \le D + 1)

    That of a tight frame; ours, not from a paper.

    Args:
        num_classes: Number of classes ``C``, at least 2.
        dim: Number of features ``D``.

    Returns:
        0 to the root of 2; NaN for fewer than two classes.

    Example:
        >>> etf_error_floor(10, 64), round(etf_error_floor(29_233, 1024), 3)
        (0.0, 1.275)
    """
    if num_classes < 2:
        return nan
    return float((2 - 2 * min(dim / (num_classes - 1), 1.0) ** 0.5) ** 0.5)


def norm_variation(part: CenteredMeans) -> Tensor:
    """:func:`nc2_equinorm` of rows that are centered already."""
    rows, present, classes = part
    norms = torch.linalg.vector_norm(rows, dim=1)
    mean = norms.sum() / classes
    variance = torch.where(present, norms - mean, 0.0).square().sum() / (classes - 1)
    return torch.where((classes > 1) & (mean > 0), safe_sqrt(variance) / mean, nan)


def angle_error(part: CenteredMeans, tile: int = 1024, sample: int | None = None) -> Tensor:
    """:func:`nc2_equiangular` of rows that are centered already."""
    rows, present, classes = part
    directions, (total, count) = unit(rows), rows.new_zeros(2).unbind()
    for block in pair_blocks(present, tile, sample):
        error = (block.products(directions) + 1 / (classes - 1)).abs()
        total, count = total + torch.where(block.pairs, error, 0.0).sum(), count + block.pairs.sum()
    return torch.where(count > 0, total / count, nan)


def frame_distance(x: Tensor, y: Tensor, present: Tensor) -> Tensor:
    r"""Distance of :math:`X Y^\top` over its norm from the Gram matrix of a simplex over its own; rows ``(C, D)``.

    Where ``C > D + 1`` the ``C x C`` matrix is not formed.
    """
    size, dim = x.shape
    mask = present.to(x.dtype)
    classes = mask.sum()
    if size <= dim + 1:
        product = x @ y.T
        simplex = (torch.diag(mask) - torch.outer(mask, mask) / classes) / (classes - 1).sqrt()
        difference = product / torch.linalg.matrix_norm(product) - simplex
        return torch.where(classes > 1, torch.linalg.matrix_norm(difference), nan)
    along = (x * y).sum() - x.sum(dim=0) @ y.sum(dim=0) / classes
    norm = safe_sqrt(((x.T @ x) * (y.T @ y)).sum().clamp_min(0))
    return torch.where(classes > 1, safe_sqrt((2 - 2 * along / (norm * (classes - 1).sqrt())).clamp_min(0)), nan)
