"""Feature decorrelation (SimTPR): coordinates of two views' directions correlate with their twins and no others."""

import math
from typing import Literal, get_args

from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.cross_correlation import correlation_terms
from lightning_collapse.losses.support.rows import unit_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_positive
from lightning_collapse.utilities.registry import register_loss

Convention = Literal["paper", "code"]
CONVENTIONS = get_args(Convention)


@full_precision
def feature_decorrelation_terms(
    first: Tensor, second: Tensor, convention: Convention = "paper", eps: float = 1e-12
) -> dict[str, Tensor]:
    """The two terms of :class:`FeatureDecorrelation`, unweighted.

    Collective: every process must call it; two all-reduces, about ``D * D`` numbers.

    Args:
        first: Representations of one view, shape ``(N, D)``.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        convention: How the correlation is normalized, see :class:`FeatureDecorrelation`.
        eps: Keeps the correlation of features without variance finite.

    Returns:
        Scalars ``invariance`` and ``redundancy``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If the views are not matrices of one shape, or have fewer than two rows over all processes.

    Example:
        >>> import torch
        >>> first = torch.arange(12.0).reshape(4, 3).sin()
        >>> second = first.flip(1)
        >>> {name: round(value.item(), 3) for name, value in feature_decorrelation_terms(first, second).items()}
        {'invariance': 6.873, 'redundancy': 5.071}
    """
    require_one_of(CONVENTIONS, convention=convention)
    views = separate_views("feature_decorrelation_terms", first=first, second=second)
    units = [unit_rows(view) for view in views]
    name = "feature_decorrelation_terms"
    return correlation_terms(name, units, eps, lost=1, mean_over_rows=convention == "code")


@register_loss
class FeatureDecorrelation(AntiCollapseLoss):
    r"""The feature decorrelation of SimTPR: that of Barlow Twins, on the directions of latent states.

    .. math:: \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2, \qquad
        C_{ij} = \operatorname{corr}(u_i, u'_j), \quad u = z / \|z\|

    with the correlation over the global batch. There the views are projections of the *next* states under two
    augmentations, every time step a row, and the term stands beside the consistency of predicted with actual states
    (whose targets carry no gradient, while here both views do) with ``weight=0.01``.

    - ``convention="paper"``: a correlation, 1 for what is equal.
    - ``convention="code"``, the released code: the unbiased deviation divides products that are averaged over ``N``, so
      the diagonal reaches ``(N - 1) / N`` at most, and the loss ``D / N**2`` at least. The code has no ``eps`` and is
      not a number where a feature has no variance.

    Args:
        invariance: Coefficient of the diagonal.
        redundancy: Coefficient λ; that of the released code by default.
        convention: Which published form.
        eps: Added to variances, which for directions are about ``1 / D``.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Lee et al., *On the importance of feature decorrelation for unsupervised representation learning in
        reinforcement learning*, ICML 2023. https://arxiv.org/abs/2306.05637, code at
        https://github.com/dojeon-ai/SimTPR.

    Example:
        >>> import torch
        >>> constant = torch.ones(8, 4)
        >>> FeatureDecorrelation()(constant, constant)
        tensor(4.)
    """

    source = "SimTPR, Lee et al., ICML 2023, arXiv 2306.05637"
    views = 2

    def __init__(
        self, invariance: float = 1.0, redundancy: float = 0.005, convention: Convention = "paper", eps: float = 1e-12
    ) -> None:
        super().__init__()
        require_one_of(CONVENTIONS, convention=convention)
        require_positive(eps=eps)
        self.convention: Convention = convention
        self.eps = eps
        self.coefficients = {"invariance": invariance, "redundancy": redundancy}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`feature_decorrelation_terms`; two views of shape ``(N, D)``."""
        first, second = views
        return feature_decorrelation_terms(first, second, self.convention, self.eps)

    @property
    def value_at_collapse(self) -> float:
        """Not a number: it grows with the width, see :meth:`at_collapse`."""
        return math.nan

    def at_perfection(self, rows: int, dim: int) -> float:
        """0, or ``D / N**2`` times the coefficient of the diagonal in the code's convention."""
        return self.coefficients["invariance"] * dim / rows**2 if self.convention == "code" else 0.0

    def at_collapse(self, rows: int, dim: int) -> float:
        """``D`` times the coefficient of the diagonal: nothing correlates."""
        return self.coefficients["invariance"] * dim

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        coefficients = ", ".join(f"{name}={value}" for name, value in self.coefficients.items())
        return f"{coefficients}, convention={self.convention!r}, eps={self.eps}"
