"""KoLeo (Kozachenko-Leonenko entropy estimator): no row may come close to its nearest neighbour."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.pairs import gather_rows
from lightning_collapse.losses.support.rows import lengths, unit_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.neighbors import nearest_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad
from lightning_collapse.utilities.registry import register_loss


@full_precision
def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Negative differential entropy of the directions of the rows, by the estimator of Kozachenko and Leonenko.

    .. math:: \ell(Z) = -\frac{1}{N} \sum_i \log\Big(\epsilon + \min_{j \ne i} \|u_i - u_j\|\Big), \qquad
        u_i = z_i / \|z_i\|

    over the rows of the global batch. Up to constants that is :math:`-H(u) / D`, so it sees how the rows lie on their
    manifold and not only their covariance; it is the estimator that other surrogates of a manifold's entropy by nearest
    neighbours [3] come down to. The paper [1] has no :math:`\epsilon`; DINOv2 [2] has 1e-8, which it adds to each
    coordinate of the difference as well. That gives rows that repeat each other a gradient of up to 1e8 in an arbitrary
    direction; here they have none, since no direction leads away from a copy, and neither have rows of zeros, which
    have no direction. Rows closer than rounding tells apart count as repeated.

    Collective: every process must call it; gathers all rows, and one all-reduce of a number. Distances cost
    ``N_here * N * D``. Only with several processes it waits for the device, to learn how many rows there are.

    Args:
        features: Representations, shape ``(N, D)``, with at least two rows over all processes.
        eps: Keeps the logarithm of repeated rows finite; DINOv2's value by default.

    Returns:
        Scalar, at least ``float32``: ``-log(sqrt(2))`` for rows at right angles, ``-log(eps)`` (18.4) if all are equal.

    Raises:
        ValueError: If ``features`` is not a matrix, or if there are fewer than two rows over all processes.

    References:
        [1] Sablayrolles et al., *Spreading vectors for similarity search*, ICLR 2019. https://arxiv.org/abs/1806.03198

        [2] Oquab et al., *DINOv2*, TMLR 2024, which weighs it 0.1. https://arxiv.org/abs/2304.07193

        [3] Liu et al., *Combating mode collapse in GANs via manifold entropy estimation*, AAAI 2023.
        https://arxiv.org/abs/2208.12055

    Example:
        >>> koleo_loss(torch.eye(3)), koleo_loss(torch.ones(4, 3))
        (tensor(-0.3466), tensor(18.4207))
    """
    (features,) = separate_views("koleo_loss", features=features)
    rows = unit_rows(features)
    everything, first = gather_rows("koleo_loss", rows)
    nearest = nearest_rows(everything, 1, first, len(rows)).squeeze(1)
    distances = lengths(rows - everything.index_select(0, nearest))
    distances = torch.where(distances <= 4 * torch.finfo(rows.dtype).eps, 0.0, distances)
    return all_reduce_sum_with_grad(-(distances + eps).log().sum()) / len(everything)


@register_loss
class KoLeo(AntiCollapseLoss):
    """Module form of ``koleo_loss``, with one term, ``entropy``.

    Args:
        eps: Keeps the logarithm of repeated rows finite.

    Raises:
        ValueError: If ``eps`` is not positive.

    Example:
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> round(KoLeo()(features).item(), 3)
        1.267
    """

    source = "Sablayrolles et al., ICLR 2019, arXiv 1806.03198, as in DINOv2"

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        require_positive(eps=eps)
        self.eps = eps
        self.coefficients = {"entropy": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"entropy": koleo_loss(features)}`` for features of shape ``(N, D)``."""
        (features,) = views
        return {"entropy": koleo_loss(features, self.eps)}

    @property
    def value_at_perfection(self) -> float:
        """Rows at right angles, which many rows in many dimensions approach: ``-log(sqrt(2))``, -0.35."""
        return -math.log(math.sqrt(2) + self.eps)

    @property
    def value_at_collapse(self) -> float:
        """``-log(eps)``, 18.4."""
        return -math.log(self.eps)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"eps={self.eps}"
