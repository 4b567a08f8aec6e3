"""Covariance term of VICReg: no feature may repeat another."""

from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.statistics import center, require_matrices, variances_and_covariance
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.registry import register_loss


@full_precision
def covariance_loss(features: Tensor) -> Tensor:
    r"""Mean over features of the squared covariances with all other features.

    .. math:: c(Z) = \tfrac{1}{D} \sum_{i \ne j} C_{ij}^2, \qquad C = \tfrac{1}{N - 1} (Z - \bar Z)^\top (Z - \bar Z)

    In one process it is computed on the cheaper side: with ``N < D`` from the ``N x N`` Gram matrix, value and
    gradient, without a ``D x D`` matrix. It can be differentiated once.

    Collective: every process must call it; two all-reduces, about ``D * D`` numbers.

    Args:
        features: Representations, shape ``(N, D)``, with at least two rows over all processes.

    Returns:
        Scalar, at least ``float32``, the value on the global batch: 0 if the features are uncorrelated, and also if
        all rows are equal, so pair it with :func:`~lightning_collapse.losses.variance_loss`. ``N - 1 < D`` rows of
        unit variance cannot read less than ``D / (N - 1) - 1``.

    Raises:
        ValueError: If ``features`` is not a matrix, or if there are fewer than two rows over all processes.

    References:
        Bardes et al., *VICReg*, ICLR 2022, eq. 3 and 4. https://arxiv.org/abs/2105.04906

    Example:
        >>> import torch
        >>> covariance_loss(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]))
        tensor(1.)
    """
    batch = center("covariance_loss", require_matrices("covariance_loss", features=features))
    _, energy = variances_and_covariance(batch)
    return energy.sum() / features.shape[1]


@register_loss
class CovarianceLoss(AntiCollapseLoss):
    """Module form of ``covariance_loss``, with one term, ``covariance``.

    Example:
        >>> import torch
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> round(CovarianceLoss()(features).item(), 3)
        0.606
    """

    source = "Bardes et al., ICLR 2022, arXiv 2105.04906"

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = {"covariance": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"covariance": covariance_loss(features)}`` for features of shape ``(N, D)``."""
        (features,) = views
        return {"covariance": covariance_loss(features)}

    @property
    def value_at_collapse(self) -> float:
        """0: equal rows have no covariance, so this term alone does not see complete collapse."""
        return 0.0
