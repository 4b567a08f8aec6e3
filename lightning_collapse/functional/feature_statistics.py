"""Feature statistics: what a spectrum cannot see of the rows, such as scale, dead features, direction and spread."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.registry import register_measure


@register_measure(
    from_spectrum=lambda record: record.variance.sqrt().mean(dim=-1),
    kind="rows",
    range="0 to infinity",
    collapsed="near 0",
    source="VICReg, arXiv 2105.04906",
    scale_free=False,
)
@full_precision
def feature_std(features: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Standard deviation over the rows, averaged over the features.

    Falls to 0 in complete collapse (all rows equal), which ranks cannot see: they do not change with scale.

    Args:
        features: Shape ``(N, D)``. Rows with NaN or infinity are left out.
        mask: Boolean, shape ``(N,)``: rows to count.

    Returns:
        0-dimensional, 0 (all rows equal) or more, in units of the features; NaN for fewer than two rows.

    Example:
        >>> feature_std(torch.tensor([[1.0, 5.0], [-1.0, 5.0]]))
        tensor(0.7071)
    """
    return _std(features, mask).mean()


@register_measure(
    from_spectrum=lambda record: record.variance.sqrt().amin(dim=-1),
    kind="rows",
    range="0 to infinity",
    collapsed="near 0",
    source="VICReg, arXiv 2105.04906",
    scale_free=False,
)
@full_precision
def feature_std_floor(features: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Standard deviation over the rows of the feature that varies least.

    Args:
        features: Shape ``(N, D)``. Rows with NaN or infinity are left out.
        mask: Boolean, shape ``(N,)``: rows to count.

    Returns:
        0-dimensional, 0 (a feature is constant) or more, in units of the features; NaN for fewer than two rows.

    Example:
        >>> feature_std_floor(torch.tensor([[1.0, 5.0], [-1.0, 5.0]]))
        tensor(0.)
    """
    return _std(features, mask).amin()


@register_measure(
    from_spectrum=lambda record: _relative_spread(record),
    kind="rows",
    range="0 to 1",
    collapsed="near 0",
    source="spread over root mean square",
)
@full_precision
def relative_spread(features: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Share of the features' root mean square that is variation and not the common mean.

    .. math:: \sqrt{\operatorname{tr} \Sigma / (\operatorname{tr} \Sigma + \|\mu\|^2)}

    Separates complete collapse (all rows near one point that is not the origin) from features that merely shrink.

    Args:
        features: Shape ``(N, D)``. Rows with NaN or infinity are left out.
        mask: Boolean, shape ``(N,)``: rows to count.

    Returns:
        0-dimensional, between 0 (all rows equal) and 1 (no common mean); NaN for no rows.

    Example:
        >>> relative_spread(torch.tensor([[4.0], [2.0]]))
        tensor(0.3162)
    """
    rows, _, weight = finite_rows(features.to(accumulation_dtype(features.device)), mask)
    mean = rows.sum(dim=0) / weight.sum()
    spread = ((rows - mean) * weight.unsqueeze(1)).square().sum() / weight.sum()
    share = spread / (spread + mean.square().sum()).clamp_min(torch.finfo(rows.dtype).tiny)
    return _root(share).to(features.dtype)


@full_precision
def _direction_sum(features: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of rows ``(..., N, D)`` of unit length, and behind it how many they are, ``(..., D + 1)``."""
    dtype = accumulation_dtype(features.device)
    rows, _, weight = finite_rows(features, mask, dtype)
    if features.dtype == dtype:  # no headroom to square in
        rows = rows / rows.detach().abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    norm = torch.linalg.vector_norm(rows, dim=-1)
    counts = weight * (norm > 0)
    shares = counts / norm.clamp_min(torch.finfo(dtype).tiny)
    total = (shares.unsqueeze(-2) @ rows).squeeze(-2)
    return torch.cat([total, counts.sum(dim=-1, keepdim=True)], dim=-1)


@register_measure(
    kind="rows",
    statistic=_direction_sum,
    from_statistic=lambda total: _direction_spread(total),
    batched=True,
    range="0 to 1",
    collapsed="near 0",
    source="Chen & He, CVPR 2021, arXiv 2011.10566",
    null=lambda n, d: math.sqrt(1 - 1 / n) if d > 1 else math.nan,
)
@full_precision
def direction_spread(features: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""How far the directions of rows differ: the :func:`relative_spread` of rows scaled to unit length.

    .. math:: \sqrt{1 - \bigl\|\tfrac{1}{n} \sum_i \hat x_i\bigr\|^2}, \quad \hat x = x / \|x\|

    Losses of the cosine, as of BYOL and SimSiam, see directions only: rows that point one way have collapsed for them,
    however their lengths vary. The standard deviation that the source watches is the mean over the features, ours is
    the quadratic mean, times the root of the width: both are 1 where rows fill the sphere.

    Args:
        features: Shape ``(N, D)``. Rows with NaN or infinity and zero rows are left out.
        mask: Boolean, shape ``(N,)``: rows to count.

    Returns:
        0-dimensional, between 0 (all rows point one way) and 1 (no common direction); NaN for no rows.

    References:
        Chen & He, *Exploring Simple Siamese Representation Learning*, CVPR 2021. https://arxiv.org/abs/2011.10566

    Example:
        >>> direction_spread(torch.tensor([[1.0, 0.0], [9.0, 0.0]]))
        tensor(0.)
        >>> direction_spread(torch.tensor([[1.0, 0.0], [-9.0, 0.0]]))
        tensor(1.)
    """
    return _direction_spread(_direction_sum(features, mask)).to(features.dtype)


@register_measure(
    from_spectrum=lambda record: _dead(record.variance.sqrt()),
    kind="rows",
    range="0 to 1",
    collapsed="near 1",
    source="share of constant features",
    sketchable=False,
)
@full_precision
def dead_dimensions(features: Tensor, mask: Tensor | None = None, threshold: float = 0.01) -> Tensor:
    r"""Share of features whose standard deviation is below a fraction of the layer's mean standard deviation.

    Args:
        features: Shape ``(N, D)``. Rows with NaN or infinity are left out.
        mask: Boolean, shape ``(N,)``: rows to count.
        threshold: The fraction.

    Returns:
        0-dimensional, between 0 and 1; 1 if all rows are equal, NaN for fewer than two rows.

    Example:
        >>> dead_dimensions(torch.tensor([[1.0, 5.0], [-1.0, 5.0]]))
        tensor(0.5000)
    """
    return _dead(_std(features, mask), threshold)


@register_measure(
    kind="rows",
    range="-1 / (n - 1) to 1",
    collapsed="near 1",
    source="Ethayarajh, EMNLP 2019, arXiv 1909.00512",
    null=lambda n, d: 0.0,
)
@full_precision
def mean_cosine(features: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean cosine over all pairs of rows, in ``O(N D)``.

    .. math:: \frac{\|\sum_i \hat x_i\|^2 - n}{n (n - 1)}, \quad \hat x = x / \|x\|

    Near 1 all rows point one way: complete collapse, or only a large common mean (as after a ReLU).

    Args:
        features: Shape ``(N, D)``. Rows with NaN or infinity and zero rows are left out.
        mask: Boolean, shape ``(N,)``: rows to count.

    Returns:
        0-dimensional, between ``-1 / (n - 1)`` and 1; 0 for isotropic features, NaN for fewer than two rows.

    References:
        Ethayarajh, *How Contextual are Contextualized Word Representations?*, EMNLP 2019.
        https://arxiv.org/abs/1909.00512

    Example:
        >>> mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
        tensor(0.3333)
    """
    unit, weight = _unit_rows(features, mask)
    count = weight.sum()
    cosine = (unit.sum(dim=0).square().sum() - count) / (count * (count - 1)).clamp_min(1)
    return torch.where(count > 1, cosine, torch.nan).to(features.dtype)


@register_measure(
    kind="rows",
    range="-4 n / (n - 1) to 0",
    collapsed="near 0",
    source="Wang & Isola, ICML 2020, arXiv 2005.10242",
    null=lambda n, d: _uniformity_on_sphere(d),
)
@full_precision
def uniformity(features: Tensor, mask: Tensor | None = None, t: float = 2.0) -> Tensor:
    r"""Log of the mean Gaussian potential between all pairs of rows on the unit sphere.

    .. math:: \log \frac{2}{n (n - 1)} \sum_{i < j} e^{-t \|\hat x_i - \hat x_j\|^2}

    Args:
        features: Shape ``(N, D)``; rows are normalized here. Rows with NaN or infinity and zero rows are left out.
        mask: Boolean, shape ``(N,)``: rows to count.
        t: The paper's 2.

    Returns:
        0-dimensional, between ``-2 t n / (n - 1)`` (a simplex) and 0 (all rows parallel); NaN for fewer than two rows.

    References:
        Wang & Isola, *Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere*, ICML 2020. https://arxiv.org/abs/2005.10242

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
        tensor(-8.)
    """
    unit, weight = _unit_rows(features, mask)
    # |x - y|^2 = 2 - 2 x.y on the sphere
    potential = t * (2 * unit @ unit.T - 2).clamp_max(0)
    pairs = weight.unsqueeze(1) * weight * (1 - torch.eye(len(unit), device=unit.device, dtype=unit.dtype))
    count = weight.sum()
    value = (
        potential.masked_fill(pairs == 0, -torch.inf).flatten().logsumexp(dim=0)
        - (count * (count - 1)).clamp_min(1).log()
    )
    return torch.where(count > 1, value, torch.nan).to(features.dtype)


@register_measure(
    kind="pairs",
    range="0 to 4",
    collapsed="near 0",
    source="Wang & Isola, ICML 2020, arXiv 2005.10242",
)
@full_precision
def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    r"""Mean distance between the two views of a sample on the unit sphere.

    .. math:: \tfrac{1}{n} \sum_i \|\hat x_i - \hat y_i\|^\alpha

    0 alone says nothing: a collapsed encoder is perfectly aligned. Read it beside :func:`uniformity`.

    Args:
        x: First views, shape ``(N, D)``; rows are normalized here. Pairs with NaN or infinity or a zero row are left
            out.
        y: Second views, shape ``(N, D)``.
        alpha: The paper's 2.

    Returns:
        0-dimensional, between 0 (views agree) and ``2 ** alpha`` (opposite); NaN for no pairs.

    Raises:
        ValueError: If the shapes differ.

    References:
        Wang & Isola, ICML 2020. https://arxiv.org/abs/2005.10242

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(2.)
    """
    if x.shape != y.shape:
        raise ValueError(f"`x` and `y` are views of the same rows, got shapes {tuple(x.shape)} and {tuple(y.shape)}.")
    dtype = x.dtype
    (x, x_counts), (y, y_counts) = _unit_rows(x, None), _unit_rows(y, None)
    counts = x_counts * y_counts
    # the power of zero has no gradient below alpha = 2
    square = (x - y).square().sum(dim=1)
    apart = square > 0
    distance = torch.where(apart, torch.where(apart, square, 1.0).pow(alpha / 2), 0.0)
    count = counts.sum()
    return torch.where(count > 0, (counts * distance).sum() / count.clamp_min(1), torch.nan).to(dtype)


def _std(features: Tensor, mask: Tensor | None) -> Tensor:
    # in float32 the rounding of the mean alone gives a constant feature of 1000 a spread of 1e-5
    rows, _, weight = finite_rows(features.to(accumulation_dtype(features.device)), mask)
    count = weight.sum()
    mean = rows.sum(dim=0) / count.clamp_min(1)
    square = ((rows - mean) * weight.unsqueeze(1)).square().sum(dim=0)
    # what varies by less than the rounding of its mean is constant, as in a spectrum
    varies = square > count * (torch.finfo(features.dtype).eps * mean).square()
    std = _root(square * varies / (count - 1).clamp_min(1)).to(features.dtype)
    return torch.where(count > 1, std, torch.nan)


def _dead(std: Tensor, threshold: float = 0.01) -> Tensor:
    # <=, so that features of which all are constant are dead and not alive
    dead = (std <= threshold * std.mean(dim=-1, keepdim=True)).to(std.dtype).mean(dim=-1)
    return torch.where(std.isnan().any(dim=-1), torch.nan, dead)


def _relative_spread(record: Any) -> Tensor:
    spread = record.variance.sum(dim=-1) * (record.count - 1) / record.count
    share: Tensor = spread / (spread + record.mean.square().sum(dim=-1)).clamp_min(torch.finfo(spread.dtype).tiny)
    return share.sqrt()


def _root(square: Tensor) -> Tensor:
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), square)


def _unit_rows(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    # in double precision: 1 - cosine is what counts, and where a mean dominates it is small
    rows, _, weight = finite_rows(features.to(accumulation_dtype(features.device)), mask)
    rows = rows / rows.detach().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    norm = rows.norm(dim=1, keepdim=True)
    return rows / norm.clamp_min(torch.finfo(rows.dtype).tiny), weight * (norm.squeeze(1) > 0)


def _direction_spread(total: Tensor) -> Tensor:
    count = total[..., -1]
    mean = total[..., :-1] / count.clamp_min(1).unsqueeze(-1)
    return torch.where(count > 0, _root((1 - mean.square().sum(dim=-1)).clamp_min(0)), torch.nan)


def _uniformity_on_sphere(d: int, t: float = 2.0) -> float:
    """Expectation on the uniform sphere: ``-2t + lgamma(d/2) + (1 - d/2) log t + log I_{d/2-1}(2t)``."""
    order = d / 2 - 1
    m = np.arange(60)
    log_terms = (2 * m + order) * math.log(t) - np.array([math.lgamma(k + 1) + math.lgamma(k + order + 1) for k in m])
    bessel = log_terms.max() + math.log(np.exp(log_terms - log_terms.max()).sum())
    return float(-2 * t + math.lgamma(d / 2) + (1 - d / 2) * math.log(t) + bessel) if d > 1 else math.nan
