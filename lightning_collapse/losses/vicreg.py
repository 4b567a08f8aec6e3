"""VICReg: views agree (invariance), features vary (variance) and do not repeat each other (covariance)."""

import math
from typing import Literal, get_args

from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.statistics import center, separate_views, variances_and_covariance
from lightning_collapse.losses.variance import variance_hinge
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_positive
from lightning_collapse.utilities.registry import register_loss

Convention = Literal["code", "paper"]
CONVENTIONS = get_args(Convention)


@full_precision
def vicreg_terms(
    first: Tensor,
    second: Tensor,
    convention: Convention = "code",
    target_std: float = 1.0,
    eps: float = 1e-4,
) -> dict[str, Tensor]:
    """The three terms of :class:`VICReg`, unweighted.

    Collective: every process must call it; two all-reduces, about ``2 D * D`` numbers.

    Args:
        first: Representations of one view, shape ``(N, D)``.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        convention: How the terms are normalized, see :class:`VICReg`.
        target_std: Floor of the standard deviation, in units of the features.
        eps: Keeps the gradient of the root finite at zero variance.

    Returns:
        Scalars ``invariance``, ``variance`` and ``covariance``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If the views are not matrices of one shape, or have fewer than two rows over all processes.

    Example:
        >>> import torch
        >>> first = torch.arange(12.0).reshape(4, 3).sin()
        >>> second = first.flip(1)
        >>> {name: round(value.item(), 3) for name, value in vicreg_terms(first, second).items()}
        {'invariance': 0.94, 'variance': 0.298, 'covariance': 1.211}
    """
    require_one_of(CONVENTIONS, convention=convention)
    views = separate_views("vicreg_terms", first=first, second=second)
    batch = center("vicreg_terms", views, extra=(views[0] - views[1]).square().sum())
    variance, energy = variances_and_covariance(batch)
    hinge = variance_hinge(variance, target_std, eps)
    dim = batch.rows.shape[-1]
    as_code = convention == "code"
    return {
        "invariance": batch.extra / (batch.samples * dim if as_code else batch.samples),
        "variance": hinge.mean() if as_code else hinge.sum(),
        "covariance": energy.sum() / dim,
    }


@register_loss
class VICReg(AntiCollapseLoss):
    r"""Variance-invariance-covariance regularization of two views.

    .. math:: \lambda\, s(Z, Z') + \mu\, v(Z, Z') + \nu\, \big(c(Z) + c(Z')\big)

    with :math:`v(Z)` of :func:`~lightning_collapse.losses.variance_loss` and :math:`c(Z)` of
    :func:`~lightning_collapse.losses.covariance_loss`. Two forms are published, with the same coefficients:

    - ``convention="code"``, what the authors released and trained with: :math:`s` is the mean of
      :math:`(z_{ij} - z'_{ij})^2` over samples *and* features, :math:`v = \tfrac{1}{2} (v(Z) + v(Z'))`.
    - ``convention="paper"``, equations 1 to 6: :math:`s = \tfrac{1}{N} \sum_i \|z_i - z'_i\|^2`, which is ``D`` times
      larger, and :math:`v = v(Z) + v(Z')`.

    So the code form with ``(25, 25, 1)`` is the paper form with ``(25 / D, 12.5, 1)``. The terms are those of the
    global batch, invariance included: in data-parallel training value and gradient are those of a single process.

    Args:
        convention: Which published form.
        invariance: Coefficient λ; published default.
        variance: Coefficient μ; published default.
        covariance: Coefficient ν; published default.
        target_std: Floor γ of the standard deviation; published default.
        eps: Keeps the gradient of the root finite at zero variance; published default.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Bardes, Ponce & LeCun, *VICReg*, ICLR 2022. https://arxiv.org/abs/2105.04906, code at
        https://github.com/facebookresearch/vicreg.

    Example:
        >>> import torch
        >>> constant = torch.ones(8, 4)
        >>> VICReg()(constant, constant)
        tensor(24.7500)
    """

    source = (
        'Bardes et al., ICLR 2022, arXiv 2105.04906, released-code form with (25, 25, 1); `convention="paper"` for '
        "the paper's"
    )
    views = 2

    def __init__(
        self,
        convention: Convention = "code",
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        target_std: float = 1.0,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        require_one_of(CONVENTIONS, convention=convention)
        require_positive(target_std=target_std, eps=eps)
        self.convention: Convention = convention
        self.target_std = target_std
        self.eps = eps
        self.coefficients = {"invariance": invariance, "variance": variance, "covariance": covariance}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`vicreg_terms`; two views of shape ``(N, D)``."""
        first, second = views
        return vicreg_terms(first, second, self.convention, self.target_std, self.eps)

    @property
    def value_at_collapse(self) -> float:
        """The variance term alone is left: 24.75 in the code's convention, 49.5 in the paper's."""
        hinge = max(0.0, self.target_std - math.sqrt(self.eps))
        return self.coefficients["variance"] * hinge * (1 if self.convention == "code" else 2)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        coefficients = ", ".join(f"{name}={value}" for name, value in self.coefficients.items())
        return f"convention={self.convention!r}, {coefficients}, target_std={self.target_std}, eps={self.eps}"
