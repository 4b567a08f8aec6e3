"""Barlow Twins: features of two views correlate with their twins and with no others."""

import math

from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.cross_correlation import correlation_terms
from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.statistics import CenteredBatch, center, require_matrices
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.registry import register_loss


@full_precision
def barlow_twins_terms(first: Tensor, second: Tensor, eps: float = 1e-5) -> dict[str, Tensor]:
    """The two terms of :class:`BarlowTwins`, unweighted.

    In one process with ``N < D`` no ``D x D`` matrix is formed; else it can be differentiated once.

    Collective: every process must call it; two all-reduces, about ``D * D + 2 D`` numbers.

    Args:
        first: Representations of one view, shape ``(N, D)``.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        eps: Added to variances, as batch normalization does.

    Returns:
        Scalars ``invariance`` and ``redundancy``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If the views are not matrices of one shape, or have fewer than two rows over all processes.

    Example:
        >>> import torch
        >>> first = torch.arange(12.0).reshape(4, 3).sin()
        >>> second = first.flip(1)
        >>> {name: round(value.item(), 3) for name, value in barlow_twins_terms(first, second).items()}
        {'invariance': 6.853, 'redundancy': 5.061}
    """
    views = require_matrices("barlow_twins_terms", first=first, second=second)
    if world_size() == 1 and len(first) < first.shape[1]:
        return _from_rows(center("barlow_twins_terms", views), eps)
    return correlation_terms("barlow_twins_terms", views, eps)


def _from_rows(batch: CenteredBatch, eps: float) -> dict[str, Tensor]:
    """The same without a ``D x D`` matrix: the squared norm of ``A.mT @ B`` is that of their Gram matrices' product."""
    rows = batch.rows * (batch.rows.square().mean(dim=1, keepdim=True) + eps).rsqrt()
    gram = product(rows, rows.mT) / batch.samples
    diagonal = (rows[0] * rows[1]).sum(dim=0) / batch.samples
    redundancy = (gram[0] * gram[1]).sum() - diagonal.square().sum()
    return {"invariance": (1 - diagonal).square().sum(), "redundancy": redundancy}


@register_loss
class BarlowTwins(AntiCollapseLoss):
    r"""Redundancy reduction between two views.

    .. math:: \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2

    with the cross-correlation :math:`C` of the features of both views over the global batch: each feature is
    standardized as by batch normalization, with the biased variance plus ``eps``. Sums, not means, over features.

    It does not see the scale of the features but for ``eps``. The released code sums :math:`C` over processes with a
    plain all-reduce, which divides the gradient by their number; here the gradient is that of a single process.

    Args:
        invariance: Coefficient of the diagonal.
        redundancy: Coefficient λ; published default.
        eps: Added to variances; that of the released code's batch normalization.

    Raises:
        ValueError: If ``eps`` is not positive.

    References:
        Zbontar, Jing, Misra, LeCun & Deny, *Barlow Twins*, ICML 2021. https://arxiv.org/abs/2103.03230, code at
        https://github.com/facebookresearch/barlowtwins.

    Example:
        >>> import torch
        >>> constant = torch.ones(8, 4)
        >>> BarlowTwins()(constant, constant)
        tensor(4.)
    """

    source = "Zbontar et al., ICML 2021, arXiv 2103.03230"
    views = 2

    def __init__(self, invariance: float = 1.0, redundancy: float = 0.0051, eps: float = 1e-5) -> None:
        super().__init__()
        require_positive(eps=eps)
        self.eps = eps
        self.coefficients = {"invariance": invariance, "redundancy": redundancy}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`barlow_twins_terms`; two views of shape ``(N, D)``."""
        first, second = views
        return barlow_twins_terms(first, second, self.eps)

    @property
    def value_at_collapse(self) -> float:
        """Not a number: it grows with the width, see :meth:`at_collapse`."""
        return math.nan

    def at_collapse(self, rows: int, dim: int) -> float:
        """``D`` times the coefficient of the diagonal: nothing correlates."""
        return self.coefficients["invariance"] * dim

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return ", ".join(f"{name}={value}" for name, value in self.coefficients.items()) + f", eps={self.eps}"
