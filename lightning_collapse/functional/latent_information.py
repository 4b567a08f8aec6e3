"""Mutual information of input and latent, and what linear variational autoencoders with a closed form predict."""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision


@full_precision
def mutual_information(
    mean: Tensor, log_variance: Tensor, samples: Tensor, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Two estimates of the mutual information of input and latent from one batch, which bracket it on average [1].

    .. math:: \hat I = \tfrac1B \sum_i \left(\ln q(z_i | x_i) - \ln \hat q(z_i)\right), \quad
        \hat q_\text{low}(z_i) = \tfrac1B \sum_j q(z_i | x_j), \quad
        \hat q_\text{up}(z_i) = \tfrac1{B - 1} \sum_{j \ne i} q(z_i | x_j)

    The lower one cannot exceed :math:`\ln B`: within one of it both are of no use, and the upper one may be many times
    too high. One batch scatters by 0.05 to 0.3: average several. Time and memory grow with :math:`B^2`.

    Args:
        mean: Of the posterior, ``(B, U)``.
        log_variance: Of the same shape.
        samples: One of every posterior, of the same shape.
        counted: Boolean, ``(B,)``: rows to count; all by default.

    Returns:
        The lower and the upper estimate in nats, 0-dimensional, double precision where there is any; NaN of fewer than
        two rows.

    References:
        [1] Poole et al., *On variational bounds of mutual information*, ICML 2019, https://arxiv.org/abs/1905.06922.

    Example:
        >>> mean = torch.tensor([[4.0], [-4.0]])
        >>> lower, upper = mutual_information(mean, torch.zeros(2, 1), mean)
        >>> round(lower.item(), 4), round(upper.item(), 4)  # two inputs that differ hold one bit
        (0.6931, 32.0)
    """
    dtype = accumulation_dtype(mean.device)
    kept = torch.ones_like(mean[:, 0], dtype=torch.bool) if counted is None else counted
    kept = kept & (mean.isfinite() & log_variance.isfinite() & samples.isfinite()).all(dim=1)
    mean, log_variance, samples = (
        x.to(dtype).masked_fill(~kept.unsqueeze(1), 0) for x in (mean, log_variance, samples)
    )
    count, precision = kept.sum().to(dtype), (-log_variance).exp()
    center = mean.sum(dim=0) / count.clamp_min(1)  # squares of what all means share would drown the rest
    mean, samples = mean - center, samples - center
    distances = samples.square() @ precision.T - 2 * samples @ (mean * precision).T
    distances = distances + (mean.square() * precision).sum(dim=1)
    densities = -(distances.clamp_min(0) + log_variance.sum(dim=1) + mean.shape[1] * log(2 * pi)) / 2
    densities = densities.masked_fill(~kept, -torch.inf)
    own = densities.diagonal()
    others = densities.masked_fill(torch.eye(len(mean), dtype=torch.bool, device=mean.device), -torch.inf).logsumexp(1)
    each = torch.stack([own - torch.logaddexp(others, own) + count.log(), own - others + (count - 1).log()])
    lower, upper = torch.where(count > 1, each.masked_fill(~kept, 0).sum(dim=1) / count, torch.nan).unbind()
    return lower, upper


@full_precision
def conditional_spectrum(condition: Tensor, target: Tensor, noise: float = 1.0) -> Tensor:
    r"""How much a condition leaves of a target for the latent of a linear conditional VAE to tell [1].

    .. math:: \operatorname{eig}\left(\Sigma_{yy} - \Sigma_{yx} \Sigma_{xx}^{+} \Sigma_{xy}\right) / \text{noise}

    On demand, and not for a training step: it waits for the device.

    As many units stay active as values exceed one, with the divergences of :func:`linear_vae_divergence`: a good
    condition collapses the latent of a model of which nothing is wrong.

    Args:
        condition: Rows ``(N, A)``.
        target: What the latent codes, ``(N, B)``.
        noise: :math:`\beta s^2`, the weight of the divergence times the variance of the decoder.

    Returns:
        Descending, ``(B,)``; NaN if a row is not finite.

    References:
        [1] Dang et al., *Beyond vanilla variational autoencoders: detecting posterior collapse in conditional and
        hierarchical variational autoencoders*, ICLR 2024, https://arxiv.org/abs/2306.05023; moments are centered here.

    Example:
        >>> x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        >>> y = torch.cat([2 * x, torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])], dim=1)
        >>> conditional_spectrum(x, y, noise=0.5).round(decimals=4)
        tensor([2., 0.])
    """
    x, y = (rows - rows.mean(dim=0) for rows in (condition, target))
    rest = y - x @ (torch.linalg.pinv(x) @ y) if bool(x.isfinite().all() & y.isfinite().all()) else y * torch.nan
    covariance = rest.T @ rest / len(rest)
    if not bool(covariance.isfinite().all()):
        return torch.full_like(covariance[0], torch.nan)
    eigenvalues: Tensor = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0) / noise
    return eigenvalues


@full_precision
def linear_vae_divergence(ratios: Tensor) -> Tensor:
    r"""Divergence of every unit at the optimum of a linear VAE, :math:`\tfrac12 \max(0, \ln r)` [1].

    Args:
        ratios: :math:`\lambda / (\beta s^2)`, eigenvalues of the data's covariance over the weight of the divergence
            times the variance of the decoder, any shape; of a conditional VAE :func:`conditional_spectrum`.

    Returns:
        Of the same shape, in nats; 0 is a collapsed unit.

    References:
        [1] Lucas et al., *Don't blame the ELBO!*, NeurIPS 2019, https://arxiv.org/abs/1911.02469.

    Example:
        >>> linear_vae_divergence(torch.tensor([4.0, 1.0, 0.5]))
        tensor([0.6931, 0.0000, 0.0000])
    """
    return ratios.clamp_min(1).log() / 2
