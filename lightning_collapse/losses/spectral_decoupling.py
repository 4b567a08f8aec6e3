"""Spectral decoupling: a penalty on the logits, so that one strong feature does not starve the others."""

from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.registry import register_loss


@full_precision
def spectral_decoupling(logits: Tensor, target: float = 0.0) -> Tensor:
    r"""Mean squared length of the logits.

    .. math:: \tfrac{1}{N} \sum_i \sum_k (z_{ik} - \gamma)^2

    With one logit, as published, this is the mean of its square; of ``K`` logits the squares are summed.

    Collective: every process must call it; one all-reduce of 3 numbers.

    Args:
        logits: Shape ``(N, K)``, with at least one row over all processes.
        target: What the logits are drawn to, :math:`\gamma`; the published value by default.

    Returns:
        Scalar, at least ``float32``, the value on the global batch.

    Raises:
        ValueError: If ``logits`` is not a matrix, or if there is no row over all processes.

    References:
        Pezeshki et al., *Gradient Starvation*, NeurIPS 2021. https://arxiv.org/abs/2011.09468

    Example:
        >>> import torch
        >>> spectral_decoupling(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor(3.)
    """
    (logits,) = separate_views("spectral_decoupling", logits=logits)
    return mean_of_rows("spectral_decoupling", (logits - target).square().sum(dim=1, keepdim=True)).squeeze(0)


@register_loss
class SpectralDecoupling(AntiCollapseLoss):
    r"""Squared logits, to be added to the cross-entropy in place of weight decay.

    .. math:: c\, \tfrac{1}{N} \sum_i \sum_k (z_{ik} - \gamma)^2

    Under cross-entropy alone the feature that is learned first takes the gradient from all others. With the penalty a
    free logit :math:`u` of a right answer settles where :math:`2 c u (1 + e^u) = 1`. One term, ``logits``.

    The paper writes :math:`\lambda / 2` for :math:`c`. The authors' coefficients run from 2e-5 (colored digits) to 0.1
    (CelebA), and their penalty starts late in some runs: see :class:`~lightning_collapse.losses.LinearWarmup`.

    Args:
        logits: Coefficient ``c``; that of the authors' two-moons experiment by default.
        target: What the logits are drawn to, γ; the published value by default.

    References:
        Pezeshki et al., *Gradient Starvation: A Learning Proclivity in Neural Networks*, NeurIPS 2021.
        https://arxiv.org/abs/2011.09468, code at https://github.com/mohammadpz/Gradient_Starvation.

    Example:
        >>> import torch
        >>> SpectralDecoupling()(torch.tensor([[1.0], [-3.0]]))
        tensor(0.0150)
    """

    source = "Pezeshki et al., NeurIPS 2021, arXiv 2011.09468; of logits, in place of weight decay"

    def __init__(self, logits: float = 0.003, target: float = 0.0) -> None:
        super().__init__()
        self.target = target
        self.coefficients = {"logits": logits}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"logits": spectral_decoupling(logits, target)}`` for logits of shape ``(N, K)``."""
        (logits,) = views
        return {"logits": spectral_decoupling(logits, self.target)}

    @property
    def value_at_perfection(self) -> float:
        """0, its least value: all logits are at the target."""
        return 0.0

    @property
    def value_at_collapse(self) -> float:
        """0 where all logits are at the target; equal rows elsewhere read what each of them reads."""
        return 0.0

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"logits={self.coefficients['logits']}, target={self.target}"
