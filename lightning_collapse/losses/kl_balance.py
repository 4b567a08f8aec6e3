"""KL balancing: a learned prior moves to the posteriors faster than they move to it."""

import torch
from torch import Tensor

from lightning_collapse.functional.gaussian_divergence import gaussian_divergence, whitened_posterior
from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.gaussian import split_gaussians
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_not_negative
from lightning_collapse.utilities.differentiable_once import once
from lightning_collapse.utilities.registry import register_loss


@full_precision
def kl_balance_terms(posterior: Tensor, prior: Tensor) -> dict[str, Tensor]:
    """The two terms of :class:`KLBalance`, equal in value; the gradient of each is that of one side.

    Collective: every process must call it; one all-reduce of 4 numbers.

    Args:
        posterior: Means and log-variances, shape ``(N, 2 * K)``.
        prior: Those of the prior of the same rows, of the same shape.

    Returns:
        Scalars ``prior`` and ``posterior`` in nats, at least ``float32``, of the global batch.

    Raises:
        ValueError: If they are not matrices of one shape with an even number of columns, or if there is no row over all
            processes.

    Example:
        >>> terms = kl_balance_terms(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        >>> terms["prior"].item(), terms["posterior"].item()
        (0.5, 0.5)
    """
    q, p = split_gaussians("kl_balance_terms", posterior=posterior, prior=prior)
    held_q, held_p = ((mean.detach(), log_variance.detach()) for mean, log_variance in (q, p))
    sides = [gaussian_divergence(*whitened_posterior(*pair)).sum(dim=1) for pair in ((*held_q, *p), (*q, *held_p))]
    means = once(mean_of_rows("kl_balance_terms", torch.stack(sides, dim=1)))
    return dict(zip(("prior", "posterior"), means.unbind(), strict=True))


@register_loss
class KLBalance(AntiCollapseLoss):
    r"""Divergence of Gaussian posteriors from a learned, conditional prior, balanced between the two.

    .. math:: \alpha\, D(\operatorname{sg}(q) \,\|\, p) + (1 - \alpha)\, D(q \,\|\, \operatorname{sg}(p))

    In place of the divergence of a conditional VAE, a hierarchy or a world model. A prior that is poor at first would
    draw the posteriors to itself, and what they tell of the input would be lost. ``KLBalance(1.0, 1.0)`` has the
    gradient of the plain divergence, and twice its value. Terms ``prior`` and ``posterior``.

    Args:
        prior: Coefficient α of the prior's side; the authors' by default. Dreamer V3 has 0.5 and 0.1.
        posterior: Coefficient 1 - α of the posteriors' side.

    Raises:
        ValueError: If a coefficient is negative or not finite.

    References:
        Hafner et al., *Mastering Atari with discrete world models* (DreamerV2), ICLR 2021, algorithm 2, of any
        distributions. https://arxiv.org/abs/2010.02193, code at https://github.com/danijar/dreamerv2.

    Example:
        >>> posterior = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> KLBalance()(posterior, torch.zeros(1, 2)).backward()
        >>> posterior.grad  # a fifth of that of the divergence
        tensor([[0.2000, 0.0000]])
    """

    source = (
        "Hafner et al., ICLR 2021, arXiv 2010.02193; of posteriors and their conditional priors, each `(N, 2 * units)`"
    )
    views = 2

    def __init__(self, prior: float = 0.8, posterior: float = 0.2) -> None:
        super().__init__()
        require_not_negative(prior=prior, posterior=posterior)
        self.coefficients = {"prior": prior, "posterior": posterior}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`kl_balance_terms`; posterior and prior, each of shape ``(N, 2 * K)``."""
        return kl_balance_terms(*views)

    @property
    def value_at_collapse(self) -> float:
        """0, where the posteriors are the prior."""
        return 0.0

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return ", ".join(f"{name}={value}" for name, value in self.coefficients.items())
