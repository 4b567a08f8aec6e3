"""Coding rate: rows on the sphere fill as large a volume as they can."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.products import logdet, product
from lightning_collapse.losses.support.rows import require_rows, unit_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad, world_size
from lightning_collapse.utilities.registry import register_loss


@full_precision
def coding_rate_loss(features: Tensor, eps: float = 0.2) -> Tensor:
    r"""Minus the total coding rate (TCR) of rows on the unit sphere.

    .. math:: -\tfrac{1}{2} \log \det \Big( I + \frac{D}{N \epsilon} X^\top X \Big), \qquad x_i = z_i / \|z_i\|

    Rows are not centered. In one process it is computed on the cheaper side, ``N x N`` or ``D x D``. It can be
    differentiated once.

    Collective: every process must call it; one all-reduce of ``D * D + 1`` numbers.

    Args:
        features: Representations, shape ``(N, D)``, at least one row over all processes; a row of zeros stays one.
        eps: Squared precision of the code :math:`\epsilon`: the papers write its root, both released codes pass it as
            it is here.

    Returns:
        Scalar, at least ``float32``, the value on the global batch: ``-log(1 + D / eps) / 2`` if all rows point one
        way, ``-D log(1 + 1 / eps) / 2`` if they point everywhere alike, which is the least.

    Raises:
        ValueError: If ``features`` is not a matrix, ``eps`` is not positive, or if there is no row over all processes.

    References:
        Yu et al., *MCR2*, NeurIPS 2020. https://arxiv.org/abs/2006.08558. Tong et al., *EMP-SSL*, 2023.
        https://arxiv.org/abs/2304.03977

    Example:
        >>> coding_rate_loss(torch.eye(4)), coding_rate_loss(torch.ones(4, 4))
        (tensor(-3.5835), tensor(-1.5223))
    """
    require_positive(eps=eps)
    (features,) = separate_views("coding_rate_loss", features=features)
    rows = unit_rows(features)
    n, dim = rows.shape
    count: Tensor
    if world_size() == 1:
        require_rows("coding_rate_loss", 1, n, n)
        count = rows.new_full((), n)
        gram = product(rows, rows.mT) if n < dim else product(rows.mT, rows)
    else:
        message = all_reduce_sum_with_grad(torch.cat([product(rows.mT, rows).flatten(), rows.new_full((1,), n)]))
        count = message[-1].detach()
        require_rows("coding_rate_loss", 1, count, n)
        gram = message[:-1].view(dim, dim)
    return -logdet(torch.eye(len(gram), dtype=rows.dtype, device=rows.device) + gram * (dim / eps) / count) / 2


@register_loss
class CodingRate(AntiCollapseLoss):
    """Module form of ``coding_rate_loss``, with one term, ``coding_rate``.

    EMP-SSL adds it to 200 times the mean negative cosine of patches with their mean.

    Args:
        eps: Squared precision of the code; the value of the released EMP-SSL code.

    Raises:
        ValueError: If ``eps`` is not positive.

    Example:
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> round(CodingRate()(features).item(), 3)
        -1.532
    """

    source = "Yu et al., NeurIPS 2020, arXiv 2006.08558, with the precision of EMP-SSL, arXiv 2304.03977"

    def __init__(self, eps: float = 0.2) -> None:
        super().__init__()
        require_positive(eps=eps)
        self.eps = eps
        self.coefficients = {"coding_rate": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"coding_rate": coding_rate_loss(features)}`` for features of shape ``(N, D)``."""
        (features,) = views
        return {"coding_rate": coding_rate_loss(features, self.eps)}

    @property
    def value_at_perfection(self) -> float:
        """``nan``: it depends on the shape, see :meth:`at_perfection`."""
        return math.nan

    def at_perfection(self, rows: int, dim: int) -> float:
        """As many equal singular values as there can be: ``K = min(N, D)`` gives ``-K log(1 + D / (K eps)) / 2``."""
        rank = min(rows, dim)
        return -rank / 2 * math.log1p(dim / (rank * self.eps))

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it depends on the number of features, see :meth:`at_collapse`."""
        return math.nan

    def at_collapse(self, rows: int, dim: int) -> float:
        """All rows point one way: ``-log(1 + D / eps) / 2``."""
        return -math.log1p(dim / self.eps) / 2

    def extra_repr(self) -> str:
        """Show the hyperparameter in ``print(model)``."""
        return f"eps={self.eps}"
