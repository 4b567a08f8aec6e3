"""Posterior collapse: how many units of a Gaussian latent hold something of the input, and how the others died."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from lightning_collapse.functional.gaussian_divergence import gaussian_divergence
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision

COLUMNS = ("mean", "mean_square", "variance", "variance_square", "log_variance", "divergence")
"""What is added up of every unit, behind the number of rows and that of those left out."""
ACTIVE_VARIANCE = 0.01
"""Variance of the posterior mean from which on a unit is active, by Burda et al."""
STEADY, NOISE, SURE = 0.1, (0.9, 1.1), 0.1
"""Bounds of the variance of the posterior variance, and of its mean in passive and in active units, by Bonheme."""
AT_PRIOR = 0.01
"""Divergence in nats below which a unit lies on the prior (ours)."""
AT_POINT = (1e-4, 1e-2)
"""Bounds of the posterior variance, and of the variance of its mean, below which a unit lies on a point (ours)."""


def latent_sums(mean: Tensor, log_variance: Tensor, counted: Tensor | None = None) -> Tensor:
    r"""What adds up over the rows of a latent, for :func:`latent_readings`.

    Args:
        mean: Of the posterior of every row, ``(N, U)``.
        log_variance: Of the same shape. Rows in which a variance is zero or not finite are left out.
        counted: Boolean, ``(N,)``: rows to count; all by default.

    Returns:
        Shape ``(2 + 6 U,)``, double precision where there is any: rows, rows left out; then of every unit the sums of
        :math:`\mu`, :math:`\mu^2`, :math:`\sigma^2`, :math:`\sigma^4`, :math:`\ln \sigma^2` and the divergence.

    Raises:
        ValueError: If shapes do not fit, or there is no unit.

    Example:
        >>> latent_sums(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)).tolist()
        [2.0, 0.0, 4.0, 10.0, 2.0, 2.0, 0.0, 5.0]
    """
    if mean.ndim != 2 or mean.shape != log_variance.shape or not mean.shape[1]:
        raise ValueError(
            f"`mean` and `log_variance` must both have shape (N, U), with a unit or more, got {tuple(mean.shape)} and"
            f" {tuple(log_variance.shape)}."
        )
    dtype = accumulation_dtype(mean.device)
    mean, log_variance = mean.to(dtype), log_variance.to(dtype)
    variance = log_variance.exp()
    asked = torch.ones_like(mean[:, 0], dtype=torch.bool) if counted is None else counted
    usable = mean.square() + variance.square()
    kept = asked & (usable.isfinite() & (variance > 0)).all(dim=1)
    columns = [mean, mean.square(), variance, variance.square(), log_variance, gaussian_divergence(mean, log_variance)]
    rows = torch.cat(columns, dim=1).masked_fill(~kept.unsqueeze(1), 0).sum(dim=0)
    return torch.cat([torch.stack([kept.sum(), (asked & ~kept).sum()]).to(dtype), rows])


def latent_readings(sums: Tensor) -> dict[str, Tensor]:
    r"""Curves of a latent from what :func:`latent_sums` added up.

    The divergence from the prior is what the units may tell of the input, and what the prior misses:

    .. math:: \mathbb E\,D_u = \underbrace{\tfrac12 \left(\ln(\mathbb E \sigma_u^2 + \operatorname{Var} \mu_u)
        - \mathbb E \ln \sigma_u^2\right)}_{\text{information ceiling}} + \underbrace{D\left(\mathcal N(\mathbb E \mu_u,
        \mathbb E \sigma_u^2 + \operatorname{Var} \mu_u) \,\|\, \mathcal N(0, 1)\right)}_{\text{prior mismatch}}

    The first part is no less than the mutual information of input and unit, since a Gaussian of the same moments is the
    nearest to the mean of all posteriors; it is 0 if and only if all posteriors are the same one, wherever that is, on
    the prior or on a point, and no scale matters to it.

    Args:
        sums: Over all rows, shape ``(2 + 6 U,)``.

    Returns:
        0-dimensional, NaN without a row: ``kl``, the divergence, and its two parts ``information_ceiling`` and
        ``prior_mismatch``, all summed over units; ``largest_ceiling`` of one unit; ``active_units``, whose mean varies
        by more than 0.01 [1]; the shares ``active``, ``passive`` and ``mixed`` of :func:`unit_kinds` [2];
        ``at_prior``, the share of units with a divergence below 0.01, and ``at_point``, of those whose variance is
        below 1e-4 while that of the mean is below 1e-2; ``mean_share`` of the divergence that is due to
        :math:`\mu^2`; ``log_variance`` and ``mean_variance`` :math:`\operatorname{Var} \mu`, means over units;
        ``units``, ``n`` rows and ``nonfinite``.

    References:
        [1] Burda et al., *Importance weighted autoencoders*, ICLR 2016, https://arxiv.org/abs/1509.00519; [2] Bonheme &
        Grzes, *Be more active!*, 2021, https://arxiv.org/abs/2109.12679; the parts: Hoffman & Johnson, *ELBO surgery*,
        2016. Thresholds of ``at_prior`` and ``at_point`` are ours.

    Example:
        >>> mean, log_variance = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[-2.0, 0.0], [-2.0, 0.0]])
        >>> found = latent_readings(latent_sums(mean, log_variance))
        >>> found["active_units"].item(), found["passive"].item(), round(found["information_ceiling"].item(), 4)
        (1.0, 0.5, 1.0635)
    """
    n, lost = sums[:2].unbind()
    means = torch.where(n > 0, sums[2:] / n.clamp_min(1), nan).view(len(COLUMNS), -1)
    mean, mean_square, variance, variance_square, log_variance, divergence = means.unbind()
    spread = (mean_square - mean.square()).clamp_min(0)
    ceiling = ((variance + spread).log() - log_variance).clamp_min(0) / 2
    active, passive, mixed = unit_kinds(variance, (variance_square - variance.square()).clamp_min(0))
    at_point = (variance < AT_POINT[0]) & (spread < AT_POINT[1])
    kl = divergence.sum()
    kinds = torch.stack([active, passive, mixed, divergence < AT_PRIOR, at_point, spread > ACTIVE_VARIANCE])
    shares = (kinds.to(sums.dtype).mean(dim=1) + 0 * kl).unbind()  # NaN without a row
    return {
        "kl": kl,
        "information_ceiling": ceiling.sum(),
        "prior_mismatch": (kl - ceiling.sum()).clamp_min(0),
        "largest_ceiling": ceiling.amax(),
        "active_units": shares[5] * len(mean),
        **dict(zip(("active", "passive", "mixed", "at_prior", "at_point"), shares[:5], strict=True)),
        "mean_share": mean_square.sum() / 2 / kl.clamp_min(torch.finfo(sums.dtype).tiny),
        "log_variance": log_variance.mean(),
        "mean_variance": spread.mean(),
        "units": torch.full_like(n, len(mean)),
        "n": n,
        "nonfinite": lost,
    }


@full_precision
def unit_kinds(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which units are active, passive and mixed, from what their posterior variance does over the data [1].

    A unit whose posterior variance hardly varies, by less than 0.1, is passive if its mean is within 0.1 of that of a
    unit prior, and active if that is at most 0.1; every other one is mixed. A unit that is passive for up to one input
    in eleven is still called active; one that tells little of all inputs, with a variance of 0.5, is mixed.

    Args:
        mean: Of the posterior variance over the data, ``(U,)``, by a unit prior.
        variance: Of the same, ``(U,)``.

    Returns:
        Three boolean tensors ``(U,)``, of which one is true of every unit; none of NaN.

    References:
        [1] Bonheme & Grzes, *Be more active! Understanding the differences between mean and sampled representations of
        variational autoencoders*, 2021, https://arxiv.org/abs/2109.12679.

    Example:
        >>> [kind.tolist() for kind in unit_kinds(torch.tensor([0.02, 1.0, 0.505]), torch.tensor([0.0, 0.01, 0.245]))]
        [[True, False, False], [False, True, False], [False, False, True]]
    """
    steady = variance < STEADY
    passive = steady & (mean >= NOISE[0]) & (mean <= NOISE[1])
    active = steady & (mean <= SURE)
    return active, passive, ~(active | passive) & mean.isfinite() & variance.isfinite()
