"""VCReg: variance and covariance of the features of a supervised network, one view."""

import math

from torch import Tensor
from torch.nn.functional import huber_loss

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.statistics import center, covariances, require_matrices, variances_and_covariance
from lightning_collapse.losses.variance import variance_hinge
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.registry import register_loss


@full_precision
def vcreg_terms(
    features: Tensor, target_std: float = 1.0, eps: float = 1e-5, delta: float | None = None
) -> dict[str, Tensor]:
    """The two terms of :class:`VCReg`, unweighted.

    Without ``delta`` it is computed in one process on the cheaper side, and can be differentiated once.

    Collective: every process must call it; two all-reduces, about ``D * D`` numbers.

    Args:
        features: Representations, shape ``(N, D)``; flatten the positions of a map to rows, or pool it.
        target_std: Floor of the standard deviation, in units of the features.
        eps: Keeps the gradient of the root finite at zero variance.
        delta: Covariances above it count linearly, see :class:`VCReg`; ``None`` squares them all.

    Returns:
        Scalars ``variance`` and ``covariance``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If ``features`` is not a matrix, or has fewer than two rows over all processes.

    Example:
        >>> import torch
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> {name: round(value.item(), 3) for name, value in vcreg_terms(features).items()}
        {'variance': 0.299, 'covariance': 0.303}
    """
    batch = center("vcreg_terms", require_matrices("vcreg_terms", features=features))
    dim = batch.rows.shape[-1]
    if delta is None:
        variance, energy = variances_and_covariance(batch)
    else:
        covariance = covariances(batch)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        energy = 2 * huber_loss(covariance - variance.diag_embed(), covariance * 0, reduction="sum", delta=delta)
    pairs = max(dim * (dim - 1), 1)
    return {"variance": variance_hinge(variance, target_std, eps).sum(), "covariance": energy.sum() / pairs}


@register_loss
class VCReg(AntiCollapseLoss):
    r"""Variance-covariance regularization of a supervised network, on one view.

    .. math:: \frac{\alpha}{D} \sum_i \max\big(0,\; \gamma - \sqrt{C_{ii} + \epsilon}\big)
        + \frac{\beta}{D (D - 1)} \sum_{i \ne j} C_{ij}^2

    with the unbiased covariance :math:`C` of the global batch. Add it to a supervised loss, on the last representation
    or on the output of every block. It differs from VICReg's terms in the mean over *pairs* of features: its
    covariance term is :math:`D - 1` times smaller. The paper's remedy for outliers replaces :math:`x^2` by
    :math:`2 \delta |x| - \delta^2` where :math:`|x| > \delta`: ``delta=1.0`` turns it on.

    The paper tunes :math:`\alpha` and :math:`\beta` per network; the coefficients and ``eps`` here are those of a
    public reimplementation (https://github.com/Algomancer/VCReg), to be tuned again.

    Args:
        variance: Coefficient α.
        covariance: Coefficient β.
        target_std: Floor γ of the standard deviation; published default.
        eps: Keeps the gradient of the root finite at zero variance.
        delta: Covariances above it count linearly; ``None`` squares them all.

    Raises:
        ValueError: If ``target_std``, ``eps`` or ``delta`` is not positive.

    References:
        Zhu, Evtimova, Chen, Shwartz-Ziv & LeCun, *Variance-Covariance Regularization Improves Representation
        Learning*, 2023. https://arxiv.org/abs/2306.13292

    Example:
        >>> import torch
        >>> VCReg(variance=1.0, eps=1e-4)(torch.ones(8, 4))
        tensor(0.9900)
    """

    source = (
        "Zhu et al. 2023, arXiv 2306.13292, mean over pairs; coefficients of a public reimplementation, to be "
        "tuned; `delta=` for the outlier form"
    )

    def __init__(
        self,
        variance: float = 0.16,
        covariance: float = 0.01,
        target_std: float = 1.0,
        eps: float = 1e-5,
        delta: float | None = None,
    ) -> None:
        super().__init__()
        require_positive(target_std=target_std, eps=eps, delta=1.0 if delta is None else delta)
        self.target_std = target_std
        self.eps = eps
        self.delta = delta
        self.coefficients = {"variance": variance, "covariance": covariance}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`vcreg_terms`; features of shape ``(N, D)``."""
        (features,) = views
        return vcreg_terms(features, self.target_std, self.eps, self.delta)

    @property
    def value_at_collapse(self) -> float:
        """The variance term alone is left: ``0.16 * (1 - sqrt(1e-5))`` by default."""
        return self.coefficients["variance"] * max(0.0, self.target_std - math.sqrt(self.eps))

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        coefficients = ", ".join(f"{name}={value}" for name, value in self.coefficients.items())
        return f"{coefficients}, target_std={self.target_std}, eps={self.eps}, delta={self.delta}"
