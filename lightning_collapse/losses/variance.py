"""Variance hinge of VICReg: no feature may stop varying."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.statistics import center, require_matrices, variances
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.registry import register_loss


@full_precision
def variance_loss(features: Tensor, target_std: float = 1.0, eps: float = 1e-4) -> Tensor:
    r"""Hinge that keeps the standard deviation of every feature above a floor.

    .. math:: v(Z) = \tfrac{1}{D} \sum_j \max\big(0,\; \gamma - \sqrt{\operatorname{Var}(z_j) + \epsilon}\big)

    with the unbiased variance. Repels small variance; on rows that are *exactly* equal its gradient is exactly zero,
    as that of any smooth function of the covariance, and cannot bring them apart again.

    Collective: every process must call it; two all-reduces, about ``2 D`` numbers.

    Args:
        features: Representations, shape ``(N, D)``, with at least two rows over all processes.
        target_std: The floor :math:`\gamma`, in units of the features; the paper's value by default.
        eps: Keeps the gradient of the root finite at zero variance; the paper's value by default.

    Returns:
        Scalar, at least ``float32``, the value on the global batch: 0 if no feature is below the floor,
        ``target_std - sqrt(eps)`` (0.99) if all rows are equal.

    Raises:
        ValueError: If ``features`` is not a matrix, or if there are fewer than two rows over all processes.

    References:
        Bardes et al., *VICReg*, ICLR 2022, eq. 1. https://arxiv.org/abs/2105.04906

    Example:
        >>> variance_loss(torch.zeros(4, 3)), variance_loss(torch.tensor([[2.0], [-2.0]]))
        (tensor(0.9900), tensor(0.))
    """
    batch = center("variance_loss", require_matrices("variance_loss", features=features))
    return variance_hinge(variances(batch), target_std, eps).sum()


def variance_hinge(variance: Tensor, target_std: float, eps: float) -> Tensor:
    """The hinge, given variances of shape ``(V, D)``; one mean over features per view, ``(V,)``."""
    return torch.relu(target_std - (variance + eps).sqrt()).mean(dim=-1)


@register_loss
class VarianceLoss(AntiCollapseLoss):
    """Module form of ``variance_loss``, with one term, ``variance``.

    Args:
        target_std: Floor of the standard deviation, in units of the features.
        eps: Keeps the gradient of the root finite at zero variance.

    Raises:
        ValueError: If ``target_std`` or ``eps`` is not positive.

    Example:
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> round(VarianceLoss()(features).item(), 3)
        0.298
    """

    source = "Bardes et al., ICLR 2022, arXiv 2105.04906"

    def __init__(self, target_std: float = 1.0, eps: float = 1e-4) -> None:
        super().__init__()
        require_positive(target_std=target_std, eps=eps)
        self.target_std = target_std
        self.eps = eps
        self.coefficients = {"variance": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"variance": variance_loss(features)}`` for features of shape ``(N, D)``."""
        (features,) = views
        return {"variance": variance_loss(features, self.target_std, self.eps)}

    @property
    def value_at_collapse(self) -> float:
        """``target_std - sqrt(eps)``, or 0 if that is negative."""
        return max(0.0, self.target_std - math.sqrt(self.eps))

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"target_std={self.target_std}, eps={self.eps}"
