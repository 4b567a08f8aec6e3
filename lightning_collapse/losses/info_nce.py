"""InfoNCE: each view tells its sample from all others (SimCLR's NT-Xent)."""

import math

from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.contrast import contrast, masked_logsumexp
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import stack_views
from lightning_collapse.losses.uniformity import sphere_potential
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.registry import register_loss


@full_precision
def info_nce_loss(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Cross-entropy of finding the other view of a row among all other rows of both views.

    .. math:: \frac{1}{2N} \sum_a -\log \frac{e^{u_a^\top u_{p(a)} / \tau}}{\sum_{k \ne a} e^{u_a^\top u_k / \tau}},
        \qquad u = z / \|z\|

    over the ``2 N`` rows of both views of the global batch, :math:`p(a)` the other view of the same sample.

    Collective: every process must call it; gathers all rows with their gradient, and one all-reduce of three numbers.
    Similarities take ``4 N_here * N`` numbers. Only with several processes it waits for the device, to learn how many
    rows there are.

    Args:
        first: Representations of one view, shape ``(N, D)``, with at least two rows over all processes.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        temperature: :math:`\tau`; that of the paper on ImageNet by default.

    Returns:
        Scalar, at least ``float32``, above 0, the value on the global batch: ``log(2 N - 1)`` if all rows are equal.

    Raises:
        ValueError: If the views are not matrices of one shape, or if there are fewer than two rows.

    References:
        van den Oord et al., *Representation learning with contrastive predictive coding*, 2018.
        https://arxiv.org/abs/1807.03748; Chen et al., *A simple framework for contrastive learning of visual
        representations*, ICML 2020. https://arxiv.org/abs/2002.05709

    Example:
        >>> import torch
        >>> same = torch.ones(2, 3)
        >>> info_nce_loss(same, same), info_nce_loss(torch.eye(2), torch.eye(2)) < 1e-3
        (tensor(1.0986), tensor(True))
    """
    pairs = contrast("info_nce_loss", stack_views("info_nce_loss", first=first, second=second), temperature, least=2)
    values = masked_logsumexp(pairs.logits, pairs.others) - pairs.other_view()
    return mean_of_rows("info_nce_loss", values.unsqueeze(1)).squeeze(0)


@register_loss
class InfoNCE(AntiCollapseLoss):
    """Module form of ``info_nce_loss``, with one term, ``info_nce``.

    Args:
        temperature: What cosines are divided by.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> views = torch.arange(24.0).reshape(2, 4, 3).sin()
        >>> round(InfoNCE()(*views).item(), 3)
        1.785
    """

    views = 2
    source = "Chen et al., ICML 2020, arXiv 2002.05709 (SimCLR, NT-Xent), temperature 0.1"

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        self.temperature = temperature
        self.coefficients = {"info_nce": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"info_nce": info_nce_loss(first, second)}`` for views of shape ``(N, D)``."""
        first, second = views
        return {"info_nce": info_nce_loss(first, second, self.temperature)}

    @property
    def value_at_perfection(self) -> float:
        """``nan``: it depends on the shape, see :meth:`at_perfection`."""
        return math.nan

    def at_perfection(self, rows: int, dim: int) -> float:
        """Views that agree, on a regular simplex where it fits, else spread evenly over the sphere."""
        fits = rows <= dim + 1
        other = -rows / (rows - 1) / self.temperature if fits else sphere_potential(dim, 0.5 / self.temperature)
        return math.log1p(2 * (rows - 1) * math.exp(other))

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it depends on the number of rows, see :meth:`at_collapse`."""
        return math.nan

    def at_collapse(self, rows: int, dim: int) -> float:
        """``log(2 N - 1)``: all rows are one point."""
        return math.log(2 * rows - 1)

    def extra_repr(self) -> str:
        """Show the hyperparameter in ``print(model)``."""
        return f"temperature={self.temperature}"
