"""Delta-VAE: a prior that is correlated in time, which independent posteriors cannot reach, commits a rate."""

import math

from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.gaussian import split_gaussians
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.registry import register_loss


@full_precision
def ar1_divergence(mean: Tensor, log_variance: Tensor, correlation: float = 0.9) -> Tensor:
    r"""Divergence of posteriors that are independent in time from a stationary AR(1) prior of unit variance.

    .. math:: D = \tfrac12 \Big(\mu_1^2 + \sigma_1^2 - 1 - \ln \sigma_1^2\Big) + \tfrac12 \sum_{t=2}^{n} \Big(
        \frac{(\mu_t - a \mu_{t-1})^2 + \sigma_t^2 + a^2 \sigma_{t-1}^2}{1 - a^2} - 1 - \ln \frac{\sigma_t^2}{1 - a^2}
        \Big)

    Args:
        mean: Of the posteriors, shape ``(N, n, C)``: rows, steps, channels.
        log_variance: Of the same shape.
        correlation: :math:`a` of a step with the one before.

    Returns:
        Shape ``(N, C)`` in nats, at least ``float32``: no less than :func:`committed_rate`.

    Raises:
        ValueError: If ``correlation`` is not in [0, 1), or the shapes are not equal and of three dimensions.

    References:
        Razavi et al., *Preventing posterior collapse with delta-VAEs*, ICLR 2019. https://arxiv.org/abs/1901.03416

    Example:
        >>> import torch
        >>> best = (1 - 0.9**2) / (1 + 0.9**2 * torch.tensor([0.0, 1.0, 0.0])).view(1, 3, 1)
        >>> round(ar1_divergence(torch.zeros(1, 3, 1), best.log()).item(), 4), round(committed_rate(3), 4)
        (1.127, 1.127)
    """
    _require_correlation(correlation)
    if mean.ndim != 3 or mean.shape != log_variance.shape:
        raise ValueError(
            f"`mean` and `log_variance` of `ar1_divergence` must both have shape (N, steps, channels), got"
            f" {tuple(mean.shape)} and {tuple(log_variance.shape)}. Unflatten the units."
        )
    rest, variance = 1 - correlation**2, log_variance.exp()
    jumps = (mean[:, 1:] - correlation * mean[:, :-1]).square() + variance[:, 1:] + correlation**2 * variance[:, :-1]
    later = jumps / rest - 1 - log_variance[:, 1:] + math.log(rest)
    first = mean[:, 0].square() + variance[:, 0] - 1 - log_variance[:, 0]
    return (first + later.sum(dim=1)) / 2


def committed_rate(steps: int, correlation: float = 0.9) -> float:
    r"""The least :func:`ar1_divergence` of a channel, in nats: what every posterior tells of something, whatever it is.

    .. math:: \delta = \tfrac12 \left((n - 2) \ln(1 + a^2) - \ln(1 - a^2)\right)

    Args:
        steps: :math:`n`, two or more.
        correlation: :math:`a` in [0, 1).

    Raises:
        ValueError: If an argument is out of range.

    References:
        Razavi et al., ICLR 2019. https://arxiv.org/abs/1901.03416

    Example:
        >>> round(committed_rate(steps=12, correlation=0.7), 5)
        2.33055
    """
    require_whole(2, steps=steps)
    _require_correlation(correlation)
    return ((steps - 2) * math.log1p(correlation**2) - math.log1p(-(correlation**2))) / 2


@register_loss
class DeltaVAE(AntiCollapseLoss):
    r"""The divergence of a VAE's posteriors from an AR(1) prior, ``ar1_divergence``, in place of the usual one.

    No encoder without correlation between units can make it less than :func:`committed_rate` times the channels, so
    the posteriors cannot collapse to the prior. That rate is what the posterior is narrower than the prior: whether the
    means tell anything of the input it does not say. To draw from the prior begin with a standard normal number and go
    on with ``a * z + (1 - a**2) ** 0.5 * noise``. One term, ``divergence``; its weight is the :math:`\beta` of a
    beta-VAE, a number or a schedule.

    Args:
        correlation: Of a step with the one before, a; ours, since the authors choose a rate.
        channels: How many units a step has. Units are steps one after the other, ``(n, C)`` flattened.

    Raises:
        ValueError: If ``correlation`` is not in [0, 1) or ``channels`` no positive integer.

    References:
        Razavi et al., *Preventing posterior collapse with delta-VAEs*, ICLR 2019. https://arxiv.org/abs/1901.03416

    Example:
        >>> import torch
        >>> round(DeltaVAE()(torch.zeros(4, 6)).item(), 4)  # of three steps, and 1.127 is the least
        6.8656
    """

    source = "Razavi et al., ICLR 2019, arXiv 1901.03416; of `(N, 2 * units)`, in place of a VAE's divergence"

    def __init__(self, correlation: float = 0.9, channels: int = 1) -> None:
        super().__init__()
        _require_correlation(correlation)
        require_whole(1, channels=channels)
        self.correlation = correlation
        self.channels = channels
        self.coefficients = {"divergence": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"divergence": ...}``, summed over channels, of means and log-variances, shape ``(N, 2 * n * C)``."""
        ((mean, log_variance),) = split_gaussians("DeltaVAE", gaussians=views[0])
        rows, units = mean.shape
        if units % self.channels or units < 2 * self.channels:
            raise ValueError(
                f"The {units} units of the latent are not two steps or more of `channels` {self.channels}."
            )
        mean, log_variance = (
            part.reshape(rows, units // self.channels, self.channels) for part in (mean, log_variance)
        )
        divergence = ar1_divergence(mean, log_variance, self.correlation).sum(dim=1, keepdim=True)
        return {"divergence": mean_of_rows("DeltaVAE", divergence).squeeze(0)}

    @property
    def value_at_perfection(self) -> float:
        """Not a number: it grows with the width, see :meth:`at_perfection`."""
        return math.nan

    @property
    def value_at_collapse(self) -> float:
        """Not a number: it grows with the width, see :meth:`at_collapse`."""
        return math.nan

    def at_perfection(self, rows: int, dim: int) -> float:
        """The committed rate of all channels, its least value."""
        rate = committed_rate(dim // 2 // self.channels, self.correlation)
        return self.coefficients["divergence"] * self.channels * rate

    def at_collapse(self, rows: int, dim: int) -> float:
        """The same, where all posteriors are the nearest to the prior."""
        return self.at_perfection(rows, dim)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"correlation={self.correlation}, channels={self.channels}"


def _require_correlation(correlation: float) -> None:
    if not 0 <= correlation < 1:
        raise ValueError(f"`correlation` must be at least 0 and below 1, got {correlation}.")
