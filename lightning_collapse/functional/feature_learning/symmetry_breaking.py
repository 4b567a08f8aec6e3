"""Symmetry breaking: at which temperature prototypes begin to differ, and where a run is beside that point."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvalues
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision

FLOOR = 1e-3
"""Least length of the mean direction that is divided by."""


class CriticalTemperature(NamedTuple):
    """Where the symmetric state of a softmax on unit vectors loses its stability; each 0-dimensional.

    Attributes:
        temperature: The critical one; a head at temperature ``t`` is at ``temperature / t`` of its critical beta.
        mean_norm: Length of the mean direction; near 0 the temperature means nothing.
        null: The critical temperature that as many rows of the same spread would read, spread alike in all directions.
    """

    temperature: Tensor
    mean_norm: Tensor
    null: Tensor


class CriticalBeta(NamedTuple):
    """Where the symmetric state of an isotropic Gaussian mixture loses its stability; each 0-dimensional.

    Attributes:
        beta: Critical inverse variance, ``1 / lambda_max``; infinite for features that do not vary.
        corrected: The same with ``lambda_max`` freed of what few rows add to it.
    """

    beta: Tensor
    corrected: Tensor


@torch.no_grad()
@full_precision
def critical_temperature(features: Tensor) -> CriticalTemperature:
    r"""Critical temperature of prototypes on the sphere (von Mises-Fisher mixture, softmax of cosines).

    .. math:: \tau_c = \frac{\lambda_{\max}(P_m \operatorname{Cov}(z) P_m)}{\|m\|}, \quad
        P_m = I - \hat m \hat m^\top, \quad \frac{\beta}{\beta_c} = \frac{\tau_c}{\tau}

    Above :math:`\tau_c` prototypes that are updated by expectation maximization all end at the mean direction; below
    it they part. It holds for unlabelled heads; balancing (Sinkhorn, centring) shifts the threshold, so read the curve
    and not the crossing. With labels the symmetric state is not stationary, and the ratio is a scale, no transition.

    Args:
        features: Shape ``(n, D)``; rows are divided by their length.

    Returns:
        Temperature, length of the mean and null, ``float64`` where the device has it.

    Raises:
        ValueError: If ``features`` is no matrix.

    References:
        For the Gaussian mixture: Yang, *Feature lottery*, 2026, https://arxiv.org/abs/2605.24057; on the sphere: ours.

    Example:
        >>> angles = torch.tensor([0.3, -0.3])
        >>> found = critical_temperature(torch.stack([angles.cos(), angles.sin()], dim=1).double())
        >>> round(found.temperature.item(), 4), round((angles.sin()[0] ** 2 / angles.cos()[0]).item(), 4)
        (0.0914, 0.0914)
    """
    rows = _matrix(features)
    rows = torch.nn.functional.normalize(rows, dim=1)
    mean = rows.mean(dim=0)
    norm = mean.norm()
    direction = mean / norm.clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows - mean
    rows = rows - (rows @ direction).unsqueeze(1) * direction
    n, dim = rows.shape
    spread = rows.square().sum() / (n * max(dim - 1, 1))
    values = torch.stack([_largest(rows) / n, spread * (1 + sqrt(max(dim - 1, 1) / n)) ** 2])
    found = values / norm.clamp_min(FLOOR)
    return CriticalTemperature(found[0], norm, found[1])


@torch.no_grad()
@full_precision
def critical_beta(features: Tensor) -> CriticalBeta:
    r"""Critical inverse variance of an isotropic Gaussian mixture, :math:`\beta_c = 1 / \lambda_{\max}(\Sigma)`.

    Few rows inflate :math:`\lambda_{\max}`: pure noise of variance :math:`\sigma^2` reads
    :math:`\sigma^2 (1 + \sqrt\gamma)^2` with :math:`\gamma = D / n` (Marchenko & Pastur), and a direction of variance
    :math:`\ell` above that noise :math:`\lambda = \ell (1 + \gamma \sigma^2 / (\ell - \sigma^2))` (Baik & Silverstein).
    The correction solves the second for :math:`\ell`, with the mean of the other eigenvalues for :math:`\sigma^2`, and
    takes :math:`\sigma^2` below the edge. A growing scale alone moves the value: watch normalized features as well.

    Args:
        features: Shape ``(n, D)``.

    Returns:
        Two numbers above 0, ``float64`` where the device has it.

    Raises:
        ValueError: If ``features`` is no matrix.

    References:
        Yang, *Feature lottery*, 2026, https://arxiv.org/abs/2605.24057; Baik & Silverstein, 2006,
        https://arxiv.org/abs/math/0408165

    Example:
        >>> critical_beta(torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]])).beta
        tensor(0.1875, dtype=torch.float64)
    """
    rows = _matrix(features)
    n, dim = rows.shape
    rows = rows - rows.mean(dim=0)
    largest, total = _largest(rows) / max(n - 1, 1), rows.square().sum() / max(n - 1, 1)
    noise, gamma = ((total - largest) / max(dim - 1, 1)).clamp_min(0), dim / n
    half = largest + noise * (1 - gamma)
    spike = (half + (half.square() - 4 * largest * noise).clamp_min(0).sqrt()) / 2
    spike = torch.where(largest > noise * (1 + sqrt(gamma)) ** 2, spike, noise)
    return CriticalBeta(1 / largest, 1 / spike)


def _matrix(features: Tensor) -> Tensor:
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"`features` must have shape (n, D), got {tuple(features.shape)}.")
    return features.to(accumulation_dtype(features.device))


def _largest(rows: Tensor) -> Tensor:
    """Largest squared singular value."""
    return eigenvalues(rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows)[0]
