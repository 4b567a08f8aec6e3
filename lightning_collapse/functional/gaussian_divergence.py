"""Kullback-Leibler divergence of Gaussian posteriors from their prior, unit by unit: the rate of a VAE."""

from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def gaussian_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""Divergence of every unit's posterior from a standard normal prior, in nats.

    .. math:: D_u = \tfrac12 \left(\mu_u^2 + \sigma_u^2 - 1 - \ln \sigma_u^2\right)

    Args:
        mean: Of the posterior, any shape. Of a conditional prior see :func:`whitened_posterior`.
        log_variance: :math:`\ln \sigma^2`, of the same shape; of standard deviations it is ``2 * std.log()``.

    Returns:
        Of the same shape, at least ``float32``: 0 on the prior, and above it elsewhere.

    References:
        Kingma & Welling, *Auto-encoding variational Bayes*, ICLR 2014, appendix B. https://arxiv.org/abs/1312.6114

    Example:
        >>> import torch
        >>> gaussian_divergence(torch.zeros(3), torch.tensor([1.0, 1e-2, 1e-6]).log())
        tensor([0.0000, 1.8076, 6.4078])
    """
    # a difference of large numbers near 0 would lose what a collapsed unit still has
    return (mean.square() + log_variance.expm1() - log_variance) / 2


@full_precision
def whitened_posterior(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor
) -> tuple[Tensor, Tensor]:
    r"""A posterior seen from its conditional prior :math:`\mathcal N(m, s^2)`, which becomes the standard normal one.

    .. math:: \mu' = (\mu - m) / s, \qquad \ln \sigma'^2 = \ln \sigma^2 - \ln s^2

    Divergences stay what they are, so whatever takes a standard normal prior for granted takes this one.

    Args:
        mean: Of the posterior, any shape.
        log_variance: Of the same shape.
        prior_mean: Of the prior of the same rows, or one for all.
        prior_log_variance: Likewise.

    Returns:
        Mean and log-variance, of the same shape, at least ``float32``.

    Example:
        >>> import torch
        >>> mean, log_variance = whitened_posterior(*(torch.tensor([x]) for x in (3.0, 0.0, 1.0, 4.0)))
        >>> round(mean.item(), 4), log_variance.item()
        (0.2707, -4.0)
    """
    return (mean - prior_mean) * (-prior_log_variance / 2).exp(), log_variance - prior_log_variance
