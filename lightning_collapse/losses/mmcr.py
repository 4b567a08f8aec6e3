"""MMCR (maximum manifold capacity representations): centroids of views span many directions evenly."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.nuclear_norm import nuclear_norm
from lightning_collapse.losses.support.rows import require_rows, unit_rows
from lightning_collapse.losses.support.statistics import stack_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.distributed import all_gather_rows_with_grad, all_reduce_sum_with_grad
from lightning_collapse.utilities.registry import register_loss


@full_precision
def mmcr_terms(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    r"""The two terms of :class:`MMCR`, unweighted.

    Collective: every process must call it. Centroids of all processes travel, and every process takes the singular
    values of all of them, which waits for the device. One all-reduce of two numbers besides, and several processes wait
    once more, to learn how many rows there are. Can be differentiated once.

    Args:
        first: Representations of one view, shape ``(N, D)``; a row of zeros stays one.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.

    Returns:
        Scalars ``centroid`` and ``local``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If the views are not matrices of one shape, or if there is no row over all processes.

    Example:
        >>> first = torch.arange(12.0).reshape(4, 3).sin()
        >>> second = first.flip(1)
        >>> {name: round(value.item(), 3) for name, value in mmcr_terms(first, second).items()}
        {'centroid': -1.452, 'local': 1.974}
    """
    views = stack_views("mmcr_terms", first=first, second=second)
    n = views.shape[1]
    a, b = unit_rows(views)
    # of unit vectors sum and difference are orthogonal: their lengths are the singular values, times sqrt(2)
    spread = ((a + b).norm(dim=-1) + (a - b).norm(dim=-1)).sum() / math.sqrt(2)
    total = all_reduce_sum_with_grad(torch.stack([spread, spread.new_full((), n)]))
    count = total[1].detach()
    require_rows("mmcr_terms", 1, count, n)
    centroids, _ = all_gather_rows_with_grad((a + b) / 2)
    return {"centroid": -nuclear_norm(centroids), "local": total[0] / count}


@register_loss
class MMCR(AntiCollapseLoss):
    r"""Maximum manifold capacity representations of two views.

    .. math:: \frac{\lambda}{N} \sum_b \|(z_b, z'_b)\|_* - \|C\|_*, \qquad c_b = \tfrac{1}{2} (z_b + z'_b)

    with rows normalized to unit length, inside, and the nuclear norm :math:`\|\cdot\|_*`. Terms ``centroid``, which is
    :math:`-\|C\|_*`, and ``local``, the mean nuclear norm of the views of a sample.

    Args:
        local: Coefficient λ; 0 in the authors' scripts, and so here.

    References:
        Yerxa et al., *Learning efficient coding of natural images with maximum manifold capacity representations*,
        NeurIPS 2023. https://arxiv.org/abs/2303.03307, code at https://github.com/ThomasYerxa/mmcr.

    Example:
        >>> import torch
        >>> constant = torch.ones(4, 4)
        >>> round(MMCR()(torch.eye(4), torch.eye(4)).item(), 4), round(MMCR()(constant, constant).item(), 4)
        (-4.0, -2.0)
    """

    source = "Yerxa et al., NeurIPS 2023, arXiv 2303.03307, local with factor 0 as in the authors' scripts"
    views = 2

    def __init__(self, local: float = 0.0) -> None:
        super().__init__()
        self.coefficients = {"centroid": 1.0, "local": local}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`mmcr_terms`; two views of shape ``(N, D)``."""
        first, second = views
        return mmcr_terms(first, second)

    @property
    def value_at_perfection(self) -> float:
        """``nan``: it depends on the shape, see :meth:`at_perfection`."""
        return math.nan

    def at_perfection(self, rows: int, dim: int) -> float:
        """Views agree and all singular values are equal: ``-sqrt(N min(N, D))``, and ``sqrt(2)`` times ``local``."""
        return self.coefficients["local"] * math.sqrt(2) - math.sqrt(rows * min(rows, dim))

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it depends on the number of rows, see :meth:`at_collapse`."""
        return math.nan

    def at_collapse(self, rows: int, dim: int) -> float:
        """All rows point one way: ``-sqrt(N)``, and ``sqrt(2)`` times ``local``."""
        return self.coefficients["local"] * math.sqrt(2) - math.sqrt(rows)

    def extra_repr(self) -> str:
        """Show the hyperparameter in ``print(model)``."""
        return f"local={self.coefficients['local']}"
