"""LiDAR (linear discriminant analysis rank): in how many directions samples differ more than their views do."""

from __future__ import annotations

from functools import lru_cache
from math import nan, pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_collapse.functional.rank import rankme
from lightning_collapse.spectral.eigenvalues import eigenvalues
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.view_moments import ViewMoments


class Lidar(NamedTuple):
    """Linear discriminant analysis rank; every field 0-dimensional.

    Attributes:
        rank: LiDAR, from 1 (collapsed) to ``min(D, n - 1)``.
        excess: Variance between samples over that within them, a mean over directions; 0 where views of a sample have
            no more in common than those of any two. Nearly unbiased; NaN unless ``n (Q - 1) > D + 1``, and where
            nothing varies.
        n: Samples behind both.
    """

    rank: Tensor
    excess: Tensor
    n: Tensor


def lidar(*views: Tensor, delta: float = 1e-4, eps: float = 1e-8, relative: bool = False) -> Lidar:
    r"""Effective rank of the matrix of linear discriminant analysis whose classes are samples, and members their views.

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \quad p_k = \lambda_k / \|\lambda\|_1 + \epsilon, \quad
        \lambda = \operatorname{eig}\big(\Sigma_w^{-1/2} \Sigma_b \Sigma_w^{-1/2}\big)

    .. math:: \Sigma_b = \tfrac{1}{n - 1} \sum_i (\mu_i - \mu)(\mu_i - \mu)^\top, \quad
        \Sigma_w = \tfrac{1}{n (Q - 1)} \sum_{i, j} (x_{ij} - \mu_i)(x_{ij} - \mu_i)^\top + \delta I

    Directions that hold nothing but what changes from view to view count as little as dead ones do, if others hold
    more. Where none does it is *full*: an entropy does not know how large the eigenvalues are, so read it beside the
    excess. It takes samples: isotropic noise, and isotropic features too, read no more than :func:`lidar_null` of as
    many samples and views. With two views and no more samples than features :math:`\delta` decides what it reads. Not
    differentiable.

    Args:
        views: Two or more, each of shape ``(N, D)``, any floating dtype, of the same samples in the same order. The
            paper takes 10 to 100, of a thousand samples or more. Samples with NaN or infinity are left out.
        delta: Keeps :math:`\Sigma_w` invertible.
        eps: Added to the shares after they were normalized.
        relative: Take ``delta`` in units of the mean variance within samples, so that the scale of the features does
            not matter. The paper does not; at a variance of one it is the same.

    Returns:
        Rank, excess and samples, ``float64`` (``float32`` on devices without); NaN for fewer than two samples. The rank
        is 1 where all samples have the same mean. Where nothing differs within samples it is the
        :func:`~lightning_collapse.functional.eigenvalue_effective_rank` of them.

    Raises:
        ValueError: If there is one view or their shapes differ, or ``delta`` is not positive.

    References:
        Thilak et al., *LiDAR*, 2023. https://arxiv.org/abs/2312.04000. Both constants are those of public code that
        follows the paper (stable-pretraining), which adds ``eps`` before normalizing; not compared with the paper.

    Example:
        >>> signal = torch.eye(6)[:, :4] * 3
        >>> lidar(signal + 0.1, signal - 0.1).rank.round(decimals=2)  # along the diagonal alone do views differ
        tensor(3., dtype=torch.float64)
    """
    stacked = stack_views(*views)
    moments = ViewMoments(stacked.shape[2], stacked.device)
    moments.update(stacked)
    return lidar_of_moments(moments, delta, eps, relative)


@full_precision
def stack_views(*views: Tensor) -> Tensor:
    """Views of shape ``(N, D)`` as one tensor ``(Q, N, D)``.

    Raises:
        ValueError: If there are fewer than two or their shapes differ.
    """
    shapes = [tuple(view.shape) for view in views]
    if len(views) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"`views` are two or more of shape (N, D), of the same samples, got shapes {shapes}.")
    return torch.stack(list(views))


@torch.no_grad()
@full_precision
def lidar_of_moments(moments: ViewMoments, delta: float = 1e-4, eps: float = 1e-8, relative: bool = False) -> Lidar:
    """:func:`lidar` from sufficient statistics, with the same arguments. Waits for the device."""
    if not delta > 0:
        raise ValueError(f"`delta` keeps a matrix invertible and must be positive, got {delta}.")
    n, degrees = moments.means.count, moments.degrees
    between, within = moments.covariances()
    dim, eye = len(within), torch.eye(len(within)).to(within)
    # the second term is for views that differ by rounding, of which a share would be no regularizer
    scale = (within.trace() + torch.finfo(within.dtype).eps * between.trace()) / dim
    unit = torch.where(scale > 0, scale, 1.0) if relative else torch.ones_like(scale)
    factor, failed = torch.linalg.cholesky_ex(within + delta * unit * eye)
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    values = eigenvalues(torch.linalg.solve_triangular(factor, half.T, upper=False))
    values = torch.where((n > 1) & (failed == 0), values, nan)
    collapsed = (between.trace() == 0) & (n > 1)
    rank = torch.where(collapsed, 1.0, rankme(values, eps))
    # of an inverse Wishart matrix the mean is too large by this
    loss = (degrees - dim - 1) / degrees.clamp_min(1)
    excess = values.mean() * loss - n / (degrees + n).clamp_min(1)
    excess = torch.where((loss > 0) & (scale > 0), excess, nan)
    return Lidar(rank, excess, n)


@lru_cache(maxsize=1024)
def lidar_null(n: int, d: int, views: int = 2) -> float:
    r"""What :func:`lidar` reads of isotropic noise, whether or not views of a sample have anything in common.

    Its matrix is a constant times :math:`F = S_1 S_2^{-1}`, of independent sample covariances with ``n - 1`` and
    ``n (views - 1)`` degrees of freedom. The eigenvalues of such a matrix follow Wachter's law on
    :math:`\big[\big(\tfrac{1 - h}{1 - y_2}\big)^2, \big(\tfrac{1 + h}{1 - y_2}\big)^2\big]` with
    :math:`y_1 = \tfrac{d}{n - 1}, y_2 = \tfrac{d}{n (Q - 1)}, h^2 = y_1 + y_2 - y_1 y_2`; this is the effective rank of
    its quantiles, within 3 % from a hundred samples on. It is the ceiling of features whose directions are all alike.

    Args:
        n: Samples.
        d: Number of features.
        views: Of each sample, ``Q``.

    Returns:
        Between 1 and ``min(n - 1, d)``; NaN unless ``n (Q - 1) > d + 1``, where without :math:`\delta` there is no
        inverse.

    References:
        Wachter, *The limiting empirical measure of multiple discriminant ratios*, 1980.

    Example:
        >>> round(lidar_null(192, 64), 1), round(lidar_null(1000, 64, views=10), 1)
        (44.6, 61.8)
    """
    degrees = n * (views - 1)
    if n < 2 or degrees <= d + 1:
        return nan
    first, second = d / (n - 1), d / degrees
    edge = (first + second - first * second) ** 0.5
    low, high = ((1 - edge) / (1 - second)) ** 2, ((1 + edge) / (1 - second)) ** 2
    # x = low + (high - low) sin^2(angle) removes the square-root singularities at both ends
    angle = (np.arange(4096) + 0.5) * pi / (2 * 4096)
    x = low + (high - low) * np.sin(angle) ** 2
    density = np.sqrt((high - x) * (x - low)) / (x * (first + second * x)) * np.sin(2 * angle)
    size = min(n - 1, d)
    cumulative = np.cumsum(density) / density.sum()
    share = np.interp((np.arange(size) + 0.5) / size, cumulative, x)
    share /= share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
