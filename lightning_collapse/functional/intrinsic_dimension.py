"""Intrinsic dimension (TwoNN, LID): how many coordinates tell neighbouring rows apart, from distances."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.neighbors import nearest_distances

Estimator = Literal["mle", "moments"]
RESOLUTION = torch.finfo(torch.float32).eps
"""Distances that differ by less than this share are equal: it is below the rounding of features."""


class TwoNN(NamedTuple):
    """Global intrinsic dimension, all 0-dimensional.

    Attributes:
        dimension: The estimate; NaN where fewer than three different rows remain.
        n: Number of rows behind it.
        ties: Finite rows left out: those that repeat another one, and those whose two nearest are equally far.
    """

    dimension: Tensor
    n: Tensor
    ties: Tensor


class LocalIntrinsicDimension(NamedTuple):
    """Intrinsic dimension from many neighbours.

    Attributes:
        dimension: Estimate for all rows together, 0-dimensional; NaN where there are too few rows.
        local: Estimate around every row, shape ``(N,)``; NaN for rows that were left out.
        n: Number of rows behind it, 0-dimensional.
        ties: Finite rows left out because they repeat another one, 0-dimensional.
    """

    dimension: Tensor
    local: Tensor
    n: Tensor
    ties: Tensor


def two_nn(
    features: Tensor, discard: float = 0.1, method: Literal["fit", "mle"] = "fit", mask: Tensor | None = None
) -> TwoNN:
    r"""Intrinsic dimension from the ratio of the distances to the two nearest neighbours.

    Where the density is constant over the distance of two neighbours, the ratios :math:`\mu_i = r_{i2}/r_{i1}` follow
    :math:`F(\mu) = 1 - \mu^{-d}`, whatever the density. With the ratios in ascending order, and the largest ones, for
    which that is least true, left out:

    .. math:: \text{fit:}\; -\log\big(1 - \tfrac{i}{n}\big) \approx d \log \mu_i \;(\text{a line through the origin});
        \quad \text{mle:}\; d = \frac{m - 1}{\sum_{i \le m} \log \mu_i + (n - m) \log \mu_m}

    ``"fit"`` is the paper's. ``"mle"`` is the maximum likelihood of the same truncated sample, made unbiased: without
    ``discard`` it is ``(n - 1)`` over the sum of logarithms. Its relative standard error is about
    ``1 / sqrt((1 - discard) * n)``, that of the fit somewhat larger.

    Both read too little above a dimension of about 15, more so the fewer rows there are: compare at one ``n``. Rows
    with NaN or infinity are left out. Rows that repeat another one (a sampler's padding, features that are all zero)
    are left out, and so are rows whose two nearest are equally far, which for continuous features has no probability:
    whole numbers or half precision make them. Where ``ties`` are many the estimate says little.

    Args:
        features: Shape ``(N, D)``.
        discard: Share of the largest ratios to leave out.
        method: See above.
        mask: Boolean, shape ``(N,)``: rows to consider.

    Returns:
        ``dimension``, ``n`` and ``ties``, ``float64``, without gradient; the dimension of features that are all equal
        is not defined and reads NaN.

    Raises:
        ValueError: If ``features`` is not a matrix, ``discard`` not in [0, 1), or the method unknown.

    References:
        Facco et al., *Estimating the intrinsic dimension of datasets by a minimal neighborhood information*,
        Scientific Reports 7, 2017. https://doi.org/10.1038/s41598-017-11873-y

    Example:
        >>> line = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> two_nn(line @ torch.ones(1, 5)).dimension.round()
        tensor(1., dtype=torch.float64)
    """
    _check(features)
    if not 0 <= discard < 1:
        raise ValueError(f"`discard` is a share and must be at least 0 and less than 1, got {discard}.")
    if method not in ("fit", "mle"):
        raise ValueError(f"`method` must be 'fit' or 'mle', got {method!r}.")
    return two_nn_of_distances(*nearest_distances(features, 2, mask), discard=discard, method=method)


def local_intrinsic_dimension(
    features: Tensor, k: int = 20, method: Estimator = "mle", mask: Tensor | None = None
) -> LocalIntrinsicDimension:
    r"""Intrinsic dimension around every row, from its ``k`` nearest neighbours, and of all rows together.

    With the distances :math:`r_1 \le \dots \le r_k` of a row to its neighbours:

    .. math:: \text{mle:}\; d = \frac{k - 2}{\sum_{j<k} \log (r_k / r_j)}; \quad
        \text{moments:}\; d = \frac{m}{r_k - m}, \; m = \frac{1}{k-1} \sum_{j<k} r_j

    ``"mle"`` is Levina and Bickel's; with ``k - 2`` instead of their ``k - 1`` one row's estimate is unbiased. For all
    rows together the inverse of the mean of the inverses is taken [2], with ``k - 1``, since it is the inverses that
    are unbiased then: averaging estimates is biased at small ``k``. ``"moments"`` leaves the ``k``-th neighbour out of
    the mean, which makes it consistent [3]; all rows together take the mean of ``m / r_k``, which is
    ``d / (d + 1)`` in expectation.

    Reads too little above a dimension of about 15, and the less the larger ``k`` is: compare at one ``n`` and ``k``.
    Rows with NaN or infinity, and rows that repeat another one, are left out.

    Args:
        features: Shape ``(N, D)``.
        k: How many neighbours; fewer where there are fewer other rows.
        method: See above.
        mask: Boolean, shape ``(N,)``: rows to consider.

    Returns:
        ``dimension``, ``local``, ``n`` and ``ties``, ``float64``, without gradient.

    Raises:
        ValueError: If ``features`` is not a matrix, ``k`` less than 3, or the method unknown.

    References:
        [1] Levina & Bickel, *Maximum likelihood estimation of intrinsic dimension*, NeurIPS 2004.

        [2] MacKay & Ghahramani, *Comments on "Maximum likelihood estimation of intrinsic dimension"*, 2005.

        [3] Amsaleg et al., *Estimating local intrinsic dimensionality*, KDD 2015. As a curve of representations:
        Huang et al., *LDReg*, ICLR 2024. https://arxiv.org/abs/2401.10474

    Example:
        >>> line = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> local_intrinsic_dimension(line @ torch.ones(1, 5)).dimension.round()
        tensor(1., dtype=torch.float64)
    """
    _check(features)
    if k < 3:
        raise ValueError(f"`k` must be at least 3, got {k}: one distance is the unit, and two more make a spread.")
    if method not in ("mle", "moments"):
        raise ValueError(f"`method` must be 'mle' or 'moments', got {method!r}.")
    return local_dimension_of_distances(*nearest_distances(features, k, mask), method=method)


@torch.no_grad()
def two_nn_of_distances(
    distances: Tensor, counts: Tensor, repeated: Tensor, discard: float = 0.1, method: Literal["fit", "mle"] = "fit"
) -> TwoNN:
    """:func:`two_nn` from what :func:`~lightning_collapse.spectral.nearest_distances` returned, ``k`` at least 2."""
    first, second = distances[:, 0], distances[:, 1]
    usable = counts & second.isfinite()
    tied = usable & (second <= (1 + RESOLUTION) * first)
    usable = usable & ~tied
    n = usable.sum().to(distances)
    logs = torch.where(usable, (second / first).log(), torch.inf).sort().values
    rank = torch.arange(1, len(logs) + 1, device=logs.device).to(logs)
    kept = ((n * (1 - discard)).floor().clamp_min(1)).minimum(n if method == "mle" else n - 1)
    logs = torch.where(rank <= kept, logs, 0.0)
    if method == "mle":
        largest = logs.amax() if len(logs) else n
        dimension = (kept - 1) / (logs.sum() + (n - kept) * largest)
    else:
        heights = -torch.log1p(-torch.where(rank <= kept, rank, 0.0) / n)
        dimension = (heights * logs).sum() / logs.square().sum()
    dimension = torch.where((n >= 3) & dimension.isfinite(), dimension, torch.nan)
    return TwoNN(dimension, n, (repeated.sum() + tied.sum()).to(n))


@torch.no_grad()
def local_dimension_of_distances(
    distances: Tensor, counts: Tensor, repeated: Tensor, method: Estimator = "mle"
) -> LocalIntrinsicDimension:
    """:func:`local_intrinsic_dimension` from what :func:`~lightning_collapse.spectral.nearest_distances` returned."""
    there = distances.isfinite()
    k = there.sum(dim=1)
    usable = counts & (k >= 3)
    last = distances.gather(1, (k - 1).clamp_min(0).unsqueeze(1))
    inner = torch.arange(distances.shape[1], device=distances.device) < (k - 1).unsqueeze(1)
    k = k.to(distances)
    ratios = torch.where(inner, distances / last, 1.0)
    n = usable.sum().to(distances)
    if method == "mle":
        total = -ratios.log().sum(dim=1)
        local = (k - 2) / total
        dimension = 1 / (torch.where(usable, total / (k - 1), 0.0).sum() / n)
    else:
        mean = torch.where(inner, ratios, 0.0).sum(dim=1) / (k - 1)
        local = mean / (1 - mean)
        pooled = torch.where(usable, mean, 0.0).sum() / n
        dimension = pooled / (1 - pooled)
    local = torch.where(usable & local.isfinite(), local, torch.nan)
    dimension = torch.where((n > 0) & dimension.isfinite(), dimension, torch.nan)
    return LocalIntrinsicDimension(dimension, local, n, repeated.sum().to(n))


def _check(features: Tensor) -> None:
    if features.ndim != 2:
        raise ValueError(
            f"`features` must have shape (N, D), got {tuple(features.shape)}. Flatten tokens or pool maps first."
        )
