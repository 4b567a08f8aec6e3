"""Free bits: units of a VAE's latent pay for their divergence from the prior only above a floor."""

import math

from torch import Tensor

from lightning_collapse.functional.gaussian_divergence import gaussian_divergence
from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.gaussian import split_gaussians
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_finite, require_not_negative, require_whole
from lightning_collapse.utilities.registry import register_loss


@full_precision
def free_bits(divergence: Tensor, floor: float = 0.25) -> Tensor:
    r"""Sum over groups of units of the mean divergence from the prior, each counted as the floor where it is below it.

    .. math:: \sum_g \max\Big(\lambda,\; \tfrac1N \sum_i D_{ig}\Big)

    The mean is over the rows of all processes and inside the maximum. Below the floor a group has no gradient at all.

    Collective: every process must call it; one all-reduce of ``G + 2`` numbers.

    Args:
        divergence: In nats, of every row and group of units, shape ``(N, G)``: a group is a unit, a channel or a level.
        floor: λ, in nats per group; that of the authors' code by default. With 0 it is the plain sum.

    Returns:
        Scalar, at least ``float32``, ``floor * G`` or more.

    Raises:
        ValueError: If ``floor`` is negative or not finite, or ``divergence`` is no matrix; or if there is no row over
            all processes.

    References:
        Kingma et al., *Improving variational inference with inverse autoregressive flow*, NeurIPS 2016.
        https://arxiv.org/abs/1606.04934, code at https://github.com/openai/iaf.

    Example:
        >>> import torch
        >>> free_bits(torch.tensor([[0.0, 3.0], [0.1, 1.0]]))
        tensor(2.2500)
    """
    require_not_negative(floor=floor)
    require_finite(floor=floor)
    if divergence.ndim != 2 or not divergence.is_floating_point():
        raise ValueError(
            f"`divergence` of `free_bits` must be floating point of shape (N, groups), got {divergence.dtype} of shape"
            f" {tuple(divergence.shape)}. Pass that of every row, before it is summed or averaged over units or the"
            " batch: the mean over rows is taken here, group by group."
        )
    return mean_of_rows("free_bits", divergence).clamp_min(floor).sum()


@register_loss
class FreeBits(AntiCollapseLoss):
    r"""The divergence of a VAE's posteriors from the standard normal prior, with free bits.

    .. math:: \sum_g \max\Big(\lambda,\; \tfrac1N \sum_i \sum_{u \in g} \tfrac12
        \left(\mu_{iu}^2 + \sigma_{iu}^2 - 1 - \ln \sigma_{iu}^2\right)\Big)

    It takes the place of the divergence in the loss; its weight is the :math:`\beta` of a beta-VAE, a number or a
    schedule such as ``LinearWarmup``, and with ``floor=0`` it is that of the plain VAE. Divide it by whatever the
    reconstruction is divided by: against a squared error that is a mean over ``P`` pixels the weight of a plain VAE
    with a decoder of unit variance is ``2 / P``.

    The floor keeps a divergence, and a divergence is no information: units that lie at the floor need not tell anything
    of the input. One term, ``divergence``. Of a conditional prior pass what
    :func:`~lightning_collapse.functional.whitened_posterior` returns.

    Args:
        floor: λ, in nats per group; that of the authors' code by default, who tried 0.125 to 8.
        group_size: How many neighbouring units a group has. The authors' are channels: of ``(N, 2 * C, H, W)`` pass
            ``flatten(1)`` and ``H * W``.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Kingma et al., NeurIPS 2016. https://arxiv.org/abs/1606.04934, code at https://github.com/openai/iaf.

    Example:
        >>> import torch
        >>> mean, log_variance = torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.zeros(2, 2)
        >>> FreeBits()(torch.cat([mean, log_variance], dim=1))
        tensor(2.2500)
    """

    source = (
        "Kingma et al., NeurIPS 2016, arXiv 1606.04934; of `(N, 2 * units)`, means and log-variances, in place of a"
        " VAE's divergence"
    )

    def __init__(self, floor: float = 0.25, group_size: int = 1) -> None:
        super().__init__()
        require_not_negative(floor=floor)
        require_finite(floor=floor)
        require_whole(1, group_size=group_size)
        self.floor = floor
        self.group_size = group_size
        self.coefficients = {"divergence": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"divergence": free_bits(...)}`` of means and log-variances, shape ``(N, 2 * K)``."""
        ((mean, log_variance),) = split_gaussians("FreeBits", gaussians=views[0])
        rows, units = mean.shape
        if units % self.group_size:
            raise ValueError(f"`group_size` {self.group_size} does not divide the {units} units of the latent.")
        groups = gaussian_divergence(mean, log_variance).reshape(rows, units // self.group_size, self.group_size)
        return {"divergence": free_bits(groups.sum(dim=2), self.floor)}

    @property
    def value_at_perfection(self) -> float:
        """Not a number: it grows with the width, see :meth:`at_perfection`."""
        return math.nan

    @property
    def value_at_collapse(self) -> float:
        """Not a number: it grows with the width, see :meth:`at_collapse`."""
        return math.nan

    def at_perfection(self, rows: int, dim: int) -> float:
        """``floor`` times the number of groups, its least value."""
        return self.coefficients["divergence"] * self.floor * (dim // 2 // self.group_size)

    def at_collapse(self, rows: int, dim: int) -> float:
        """The same, where all posteriors are the prior."""
        return self.at_perfection(rows, dim)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"floor={self.floor}, group_size={self.group_size}"
