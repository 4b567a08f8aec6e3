"""VCI (variability collapse index): how much of the features' variation a linear probe for the classes leaves over."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import (
    centered_means,
    in_input_precision,
    present_rows,
    rounding_variance,
)
from lightning_collapse.spectral.eigenvalues import eigenvectors


@in_input_precision
def vci(
    means: Tensor,
    within: Tensor,
    counts: Tensor | None = None,
    adjusted: bool = False,
    *,
    resolution: float | Tensor | None = None,
) -> Tensor:
    r"""Variability collapse index.

    .. math:: \mathrm{VCI} = 1 - \frac{\operatorname{tr}(\Sigma_T^+ \Sigma_B)}{\min(D, C - 1)}, \quad
        \Sigma_T = \Sigma_W + \Sigma_B

    One minus the mean squared canonical correlation between features and class labels: unchanged by any invertible
    linear map of the features, and between 0 and 1. Directions along which the features vary by no more than their
    rounding explain nothing.

    Args:
        means: Class means, shape ``(C, D)``.
        within: :math:`\Sigma_W`, shape ``(D, D)``, divided by the number of rows.
        counts: Rows of each class, shape ``(C,)``: classes without rows are left out, the others weigh by their rows
            in :math:`\Sigma_B`, so that :math:`\Sigma_T` is the covariance of the rows (our choice). Classes weigh
            alike if ``None``.
        adjusted: Multiply by ``(N - 1) / (N - 1 - D)``, as in an adjusted coefficient of determination (ours), so that
            features without class structure read 1 on average; it may exceed 1. The plain index reads
            ``1 - D / (N - 1)`` for them and 0 for any ``N <= D + 1`` rows in general position, which is no collapse.
        resolution: Relative rounding of the features, as in :func:`~lightning_collapse.functional.nc1`.

    Returns:
        0-dimensional, 0 (collapsed) to 1; NaN for fewer than two classes, for features that do not vary, and adjusted
        for ``N <= D + 1``.

    Raises:
        ValueError: If a shape does not fit, or ``adjusted`` is asked for without ``counts``.

    References:
        Xu, Liu, ICML 2023. https://arxiv.org/abs/2306.03440; the rank of :math:`\Sigma_B` as ``min(D, C - 1)`` is that
        of public code.

    Example:
        >>> vci(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.eye(2))
        tensor(0.5000)
    """
    if adjusted and counts is None:
        raise ValueError("`adjusted` needs `counts`, the number of rows of each class.")
    rounding = rounding_variance(means, within, counts, resolution)
    rows, present, classes = present_rows(means, counts)
    share = (present if counts is None else torch.where(present, counts, 0)).to(rows)
    share = share / share.sum()
    rows = centered_means(means, counts, share @ rows).rows * share.sqrt().unsqueeze(1)
    total = torch.addmm(within.to(rows), rows.T, rows)
    rank = (classes - 1).clamp(0, rows.shape[1])
    value = (1 - whitened(rows, total, rounding).square().sum() / rank).clamp(0, 1)
    defined = (rank > 0) & (total.trace() > 0)
    if adjusted and counts is not None:
        n = torch.where(present, counts, 0).to(rows).sum()
        value = value * (n - 1) / (n - 1 - rows.shape[1])
        defined &= n > rows.shape[1] + 1
    return torch.where(defined, value, nan)


def whitened(rows: Tensor, total: Tensor, rounding: Tensor) -> Tensor:
    r"""Rows of which the inner products are :math:`M \Sigma_T^+ M^\top`. Waits for the device, as decompositions do.

    The sum of their squares, and their squared singular values, are of the canonical correlations.

    Args:
        rows: :math:`M`, centered class means times the root of their share, ``(C, D)``.
        total: :math:`\Sigma_T`, ``(D, D)``.
        rounding: What :func:`rounding_variance` says, ``(D,)``.
    """
    eps = torch.finfo(total.dtype).eps
    variance = total.diagonal()
    # features that do not vary, such as dead units, must not make it singular
    alive = ((variance > len(variance) * eps * variance.amax()) & (variance > rounding)).to(total)
    regular = torch.where(torch.outer(alive, alive) > 0, total, 0.0)
    regular.diagonal().add_((1 - alive) * variance.amax())
    factor, failed = torch.linalg.cholesky_ex(regular)
    pivots = factor.diagonal().square()
    # a fifth of the time of the eigenvalues, where there is nothing to cut off: far from the cutoff below
    cutoff = (rounding.amax() / pivots.amax()).clamp_min(eps)
    if (failed == 0) & (pivots.amin() > cutoff.sqrt() * pivots.amax()):
        white: Tensor = torch.linalg.solve_triangular(factor, (rows * alive).T, upper=False)
        return white.T
    values, vectors = eigenvectors(total)
    keep = (values > len(values) * eps * values[:1]) & (values > rounding @ vectors.square())
    return torch.where(keep, rows @ vectors / torch.where(keep, values, 1.0).sqrt(), 0.0)
