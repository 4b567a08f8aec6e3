"""Alignment: two views of one sample are near each other on the sphere."""

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.rows import require_rows, unit_rows
from lightning_collapse.losses.support.statistics import stack_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad
from lightning_collapse.utilities.registry import register_loss


@full_precision
def alignment_loss(first: Tensor, second: Tensor, alpha: float = 2.0) -> Tensor:
    r"""Mean distance of two views on the unit sphere, to a power.

    .. math:: \tfrac{1}{N} \sum_i \Big\| \tfrac{z_i}{\|z_i\|} - \tfrac{z'_i}{\|z'_i\|} \Big\|^\alpha

    It is 0 at complete collapse, too: pair it with :func:`~lightning_collapse.losses.uniformity_loss`.

    Collective: every process must call it; one all-reduce of two numbers.

    Args:
        first: Representations of one view, shape ``(N, D)``; a row of zeros stays one.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        alpha: The power, at least 1; the paper's value by default.

    Returns:
        Scalar, at least ``float32``, the value on the global batch, between 0 and ``2 ** alpha``.

    Raises:
        ValueError: If the views are not matrices of one shape, or if there is no row over all processes.

    References:
        Wang & Isola, *Understanding contrastive representation learning through alignment and uniformity on the
        hypersphere*, ICML 2020. https://arxiv.org/abs/2005.10242

    Example:
        >>> alignment_loss(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [5.0, 0.0]]))
        tensor(1.)
    """
    views = stack_views("alignment_loss", first=first, second=second)
    a, b = unit_rows(views)
    squares = (a - b).square().sum(dim=-1)
    if alpha != 2:
        apart = squares > 0  # the power has no finite slope at 0, the subgradient there is 0
        squares = torch.where(apart, torch.where(apart, squares, torch.ones_like(squares)) ** (alpha / 2), squares)
    n = views.shape[1]
    total = all_reduce_sum_with_grad(torch.stack([squares.sum(), squares.new_full((), n)]))
    count = total[1].detach()
    require_rows("alignment_loss", 1, count, n)
    return total[0] / count


@register_loss
class Alignment(AntiCollapseLoss):
    """Module form of ``alignment_loss``, with one term, ``alignment``.

    Args:
        alpha: Power of the distance.

    Raises:
        ValueError: If ``alpha`` is less than 1, where the slope at agreement is infinite.

    Example:
        >>> first = torch.arange(12.0).reshape(4, 3).sin()
        >>> second = first.flip(1)
        >>> round(Alignment()(first, second).item(), 3)
        1.89
    """

    source = "Wang & Isola, ICML 2020, arXiv 2005.10242, of normalized rows"
    views = 2

    def __init__(self, alpha: float = 2.0) -> None:
        super().__init__()
        if not alpha >= 1:
            raise ValueError(f"`alpha` must be at least 1, got {alpha}: below, the slope at agreement is infinite.")
        self.alpha = alpha
        self.coefficients = {"alignment": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"alignment": alignment_loss(first, second)}`` for two views of shape ``(N, D)``."""
        first, second = views
        return {"alignment": alignment_loss(first, second, self.alpha)}

    @property
    def value_at_collapse(self) -> float:
        """0: equal rows are aligned, so this term alone does not see complete collapse."""
        return 0.0

    def extra_repr(self) -> str:
        """Show the hyperparameter in ``print(model)``."""
        return f"alpha={self.alpha}"
