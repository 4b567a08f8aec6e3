"""NC1: how much features vary within their class, measured by how far the class means lie apart."""

from __future__ import annotations

from math import nan
from typing import Literal

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import (
    CenteredMeans,
    centered_means,
    in_input_precision,
    rounding_variance,
)
from lightning_collapse.spectral.eigenvalues import eigenvectors


@in_input_precision
def nc1(
    means: Tensor,
    within: Tensor,
    counts: Tensor | None = None,
    global_mean: Tensor | None = None,
    method: Literal["pinv", "quotient"] = "pinv",
    per_class: bool = True,
    *,
    resolution: float | Tensor | None = None,
) -> Tensor:
    r"""Variability collapse: the within-class covariance relative to the between-class covariance.

    .. math:: \mathrm{NC1} = \tfrac1C \operatorname{tr}(\Sigma_W \Sigma_B^+), \quad
        \Sigma_W = \tfrac1N \sum_i (x_i - \mu_{y_i})(x_i - \mu_{y_i})^\top, \quad
        \Sigma_B = \tfrac1C \sum_c (\mu_c - \mu_G)(\mu_c - \mu_G)^\top

    Falls towards 0 as features collapse onto their class means. :math:`\Sigma_B` has rank ``C - 1`` at most, so the
    pseudo-inverse is taken on the smaller side, ``C x C`` or ``D x D``, without the directions along which the features
    vary by no more than their rounding. Unbounded as class means coincide: read it
    beside :func:`between_rank`. Measure in eval mode on clean data; augmentation and dropout change it by orders of
    magnitude. What features without any class structure read is :func:`nc1_null`.

    Published forms: ``tr / C`` [2] is the default; the figure of [1] shows the trace itself (``per_class=False``), from
    the top ``C - 1`` singular triplets of :math:`\Sigma_B`, which are all it has up to rounding;
    ``method="quotient"`` is :math:`\operatorname{tr} \Sigma_W / \operatorname{tr} \Sigma_B` [3], a different number,
    which needs no ``Sigma_W`` but its trace and is never divided by ``C``.

    Args:
        means: Class means, shape ``(C, D)``.
        within: :math:`\Sigma_W`, shape ``(D, D)``, divided by the number of rows; for ``"quotient"`` also its trace,
            0-dimensional.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out. All are there if ``None``.
        global_mean: :math:`\mu_G`, shape ``(D,)``; the mean of the class means by default, as in [1]. [2] takes the
            mean of all rows, the same if classes are balanced.
        method: See above.
        per_class: Divide the trace by the number of classes that are there.
        resolution: Relative rounding of the features, ``torch.finfo(features.dtype).eps``, as in
            ``ClassMoments.resolution``; that of ``means`` by default.

    Returns:
        0-dimensional, 0 (collapsed) to infinity; NaN if the class means coincide or a number is not finite.

    Raises:
        ValueError: If a shape does not fit or ``method`` is unknown.

    References:
        [1] Papyan, Han, Donoho, PNAS 2020. https://arxiv.org/abs/2008.08186
        [2] Zhu et al., NeurIPS 2021. https://arxiv.org/abs/2105.02375
        [3] Tirer et al., ICML 2023, as named in public code; not verified in the paper.

    Example:
        >>> means = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> nc1(means, torch.eye(2) / 4), nc1(means, torch.eye(2) / 4, method="quotient")
        (tensor(0.1250), tensor(0.5000))
    """
    if method not in ("pinv", "quotient"):
        raise ValueError(f'`method` must be "pinv" or "quotient", got {method!r}.')
    part = centered_means(means, counts, global_mean)
    if method == "quotient":
        trace = within.trace() if within.ndim else within
        between = part.rows.square().sum() / part.classes
        return torch.where(between > 0, trace / between, nan)
    value, _ = within_over_between(part, within, rounding_variance(means, within, counts, resolution))
    return value / part.classes if per_class else value


@in_input_precision
def between_rank(
    means: Tensor,
    counts: Tensor | None = None,
    global_mean: Tensor | None = None,
    *,
    within: Tensor | None = None,
    resolution: float | Tensor | None = None,
) -> Tensor:
    r"""Rank of the between-class covariance that :func:`nc1` inverts, at most ``min(C - 1, D)``.

    Args:
        means: Class means, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out.
        global_mean: Shape ``(D,)``; the mean of the class means by default.
        within: :math:`\Sigma_W`, shape ``(D, D)``: directions that it fills count where class means tell little.
        resolution: As in :func:`nc1`.

    Returns:
        0-dimensional; NaN if a number is not finite. Less than ``min(C - 1, D)`` where class means coincide or lie in
        fewer dimensions.

    Example:
        >>> between_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))
        tensor(1.)
    """
    rounding = rounding_variance(means, within, counts, resolution)
    return within_over_between(centered_means(means, counts, global_mean), within, rounding)[1]


def nc1_null(n: float, num_classes: int, dim: int) -> float:
    r"""What :func:`nc1` reads, nearly, for ``n`` features that know nothing of their balanced classes.

    .. math:: \frac{(n / C - 1)(C - 1)}{D - C}

    By the expected inverse of a Wishart matrix; ours, not from a paper. It grows with ``n``, so compare values at one
    number of rows, and with this.

    Args:
        n: Rows over all classes.
        num_classes: Number of classes ``C``.
        dim: Number of features ``D``.

    Returns:
        0 or more; NaN unless ``C < D``, ``C >= 2`` and ``n >= C``.

    Example:
        >>> round(nc1_null(10_000, 10, 64), 1)
        166.5
    """
    if not (2 <= num_classes < dim and n >= num_classes):
        return nan
    return (n / num_classes - 1) * (num_classes - 1) / (dim - num_classes)


def within_over_between(
    part: CenteredMeans, within: Tensor | None, rounding: Tensor, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r""":math:`\operatorname{tr}(\Sigma_W \Sigma_B^+)` and the rank of :math:`\Sigma_B`, from one decomposition.

    With :math:`\Sigma_B = M^\top M / C`, :math:`G = M M^\top = U \Lambda U^\top` and the rows :math:`q_i` of
    :math:`U^\top M`, the trace is :math:`C \sum_i q_i \Sigma_W q_i^\top / \lambda_i^2`. Left out are directions whose
    variance within classes is at most what rounding makes, and that between them the most that ``C x D`` numbers as
    large have along one direction, :math:`(1 + \sqrt{D / C})^2` times as much; and the last ones,
    if the features themselves lie in fewer directions.

    Args:
        part: Centered class means, ``(C, D)``.
        within: :math:`\Sigma_W`, shape ``(D, D)``; zero by default.
        rounding: What :func:`rounding_variance` says, ``(D,)``.
        largest: The rank at most, 0-dimensional: that of features made with the same weights, which behind a LayerNorm
            lie in a plane. Those of different steps do not, since it turns with the weights.
    """
    rows, _, classes = part
    size, dim = rows.shape
    within = rows.new_zeros(dim, dim) if within is None else within
    values, vectors = eigenvectors(rows @ rows.T if size <= dim else rows.T @ rows)
    # a direction on the smaller side has squared length lambda
    directions, square = (vectors.T @ rows, values) if size <= dim else (vectors.T, torch.ones_like(values))
    variance = ((directions @ within.to(rows)) * directions).sum(dim=1).clamp_min(0)
    noise = directions.square() @ rounding
    spread = (variance > noise) | (values * square / classes > noise * (1 + (dim / classes).sqrt()).square())
    if largest is not None:
        spread &= torch.arange(len(values), device=values.device) < largest
    keep = spread & (values > max(size, dim) * torch.finfo(values.dtype).eps * values[:1])
    ratio = torch.where(keep, variance / torch.where(keep, values * square, 1.0), 0.0)
    rank = torch.where(values.isnan().any(), nan, keep.sum().to(values.dtype))
    return torch.where(rank > 0, classes * ratio.sum(), nan), rank
