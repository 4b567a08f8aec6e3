"""Deep SVDD (support vector data description): the features of normal data lie in a small sphere."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.state import finite_or
from lightning_collapse.losses.support.statistics import CenteredBatch, covariances, separate_views, variances
from lightning_collapse.losses.support.statistics import center as center_rows
from lightning_collapse.losses.support.whitening import inverse_cholesky
from lightning_collapse.losses.variance import variance_hinge
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.distributed import all_gather_rows_with_grad
from lightning_collapse.utilities.registry import register_loss

RIDGE = 1e-4  # of the covariance in Mahalanobis distances; the authors' value
NOT_ZERO = 0.1  # the least size of a number of a center that is the mean of a batch; the authors' value
EPS = 1e-4  # of the hinge, as VICReg has it


@full_precision
def svdd_scores(features: Tensor, center: Tensor, covariance: Tensor | None = None) -> Tensor:
    r"""Squared distances from a center, the anomaly scores of :class:`DeepSVDD`.

    Args:
        features: Shape ``(N, D)``.
        center: Shape ``(D,)``.
        covariance: Shape ``(D, D)``, for squared Mahalanobis distances, with 1e-4 added to the variances. It should
            not be that of ``features``: the mean of their distances is then :math:`D (N - 1) / N`, whatever they are.

    Returns:
        Shape ``(N,)``, at least ``float32``, 0 or more.

    Example:
        >>> features = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> svdd_scores(features, torch.zeros(2)), svdd_scores(features, torch.zeros(2), 4 * torch.eye(2))
        (tensor([25.,  4.]), tensor([6.2498, 1.0000]))
    """
    (rows,) = separate_views("svdd_scores", features=features)
    away = rows - center.to(rows)
    if covariance is not None:
        wide = covariance.to(accumulation_dtype(rows.device))
        eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        away = product(away, inverse_cholesky(wide + RIDGE * eye).to(rows).mT)
    return away.square().sum(dim=1)


@register_loss
class DeepSVDD(AntiCollapseLoss):
    r"""Deep support vector data description, with a hinge that keeps features from becoming constant.

    .. math:: \frac{1}{N} \sum_i \|z_i - c\|^2 + \lambda \sum_j \max\big(0,\; 1 - \sqrt{\operatorname{Var}(z_j)
        + \epsilon}\big)

    The published objective, ``variance=0``, has constant features for its minimum, which a network without biases, and
    a center that is not 0, are to keep it from. With the hinge, ours, the minimum is at a standard deviation of
    :math:`\lambda / 2` (and not above 1). Terms ``distance`` and ``variance``.

    ``soft_boundary`` is the other published form: :math:`R^2 + \tfrac{1}{\nu N} \sum_i \max(0, d_i^2 - R^2)` in place
    of the mean distance, where :math:`R` is the quantile :math:`1 - \nu` of the distances in the batch before.

    ``momentum`` makes distances Mahalanobis ones (M-SVDD), to running means of center and covariance of the batches
    before. With those of the batch itself, as there (by a robust estimate), the mean distance says nothing of the
    features, see :func:`svdd_scores`; with these it falls below the number of features when they shrink.

    It remembers: center, covariance and radius are buffers that no ``state_dict`` holds, set by the first batch in
    training mode; :func:`svdd_scores` takes them. A batch that is not finite does not move them.

    Args:
        distance: Coefficient of the distances.
        variance: Coefficient λ of the hinge; ours.
        center: Shape ``(D,)``, not all 0, to stay. By default the mean of the first batch, with numbers that are
            smaller than 0.1 moved there; the authors take that of all data: pass it.
        soft_boundary: Share ν of rows outside of the sphere; the authors' value is 0.1. None by default.
        momentum: Share of the earlier covariance and center, such as 0.99, for Mahalanobis distances.

    Raises:
        ValueError: If an argument is out of range, or, when it is called, if the number of features has changed.

    References:
        Ruff et al., *Deep One-Class Classification*, ICML 2018. https://proceedings.mlr.press/v80/ruff18a.html, code
        at https://github.com/lukasruff/Deep-SVDD-PyTorch. M-SVDD: code at https://github.com/jamesyang7/M-SVDD.

    Example:
        >>> loss, features = DeepSVDD(), torch.tensor([[2.0, 3.0], [4.0, 5.0]])
        >>> loss(features), loss.center, loss(torch.full((2, 2), 3.0))
        (tensor(2.), tensor([3., 4.]), tensor(2.9800))
    """

    source = "Ruff et al., ICML 2018, with a variance hinge of ours; `variance=0` as published, without biases"
    center: Tensor | None
    covariance: Tensor | None
    radius: Tensor | None

    def __init__(
        self,
        distance: float = 1.0,
        variance: float = 1.0,
        center: Tensor | None = None,
        soft_boundary: float | None = None,
        momentum: float | None = None,
    ) -> None:
        super().__init__()
        if soft_boundary is not None and not 0 < soft_boundary < 1:
            raise ValueError(f"`soft_boundary` must be between 0 and 1, got {soft_boundary}. None takes all distances.")
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be at least 0 and below 1, got {momentum}. Try 0.99.")
        if center is not None and (center.ndim != 1 or not center.isfinite().all() or not center.any()):
            raise ValueError(
                f"`center` must be finite numbers of shape (D,), not all 0, got shape {tuple(center.shape)}. A network"
                " reaches 0 by small weights alone; take the mean of the features of your data."
            )
        self.soft_boundary = soft_boundary
        self.momentum = momentum
        self.fixed = center is not None
        self.coefficients = {"distance": distance, "variance": variance}
        self.register_buffer("center", None if center is None else center.detach().clone(), persistent=False)
        self.register_buffer("covariance", None, persistent=False)
        self.register_buffer("radius", None, persistent=False)

    @full_precision
    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """Of features of shape ``(N, D)``; collective, four all-reduces, about ``3 D`` numbers."""
        (features,) = separate_views("DeepSVDD", features=views[0])
        batch = center_rows("DeepSVDD", [features])
        wide = accumulation_dtype(features.device)
        mean = mean_of_rows("DeepSVDD", features.detach().to(wide)).to(features)
        center, covariance = self._reference(mean, batch)
        scores = svdd_scores(features, center, covariance)
        if self.soft_boundary is not None:
            scores = self._outside(scores, self.soft_boundary)
        hinge = features.shape[1] * variance_hinge(variances(batch), 1.0, EPS)
        return {"distance": mean_of_rows("DeepSVDD", scores.unsqueeze(1)).squeeze(0), "variance": hinge.sum()}

    def _reference(self, mean: Tensor, batch: CenteredBatch) -> tuple[Tensor, Tensor | None]:
        """What distances are taken to, from the batches before; this batch counts after that."""
        if self.center is not None and self.center.shape != mean.shape:
            raise ValueError(f"`DeepSVDD` remembers {len(self.center)} features, got {len(mean)}. Use one per layer.")
        if self.momentum is None:
            fresh = torch.where(mean.abs() < NOT_ZERO, NOT_ZERO * torch.where(mean < 0, -1.0, 1.0), mean)
            center = fresh if self.center is None else finite_or(self.center.to(mean), fresh)
            if self.training and not self.fixed:
                self.center = center
            return center, None
        own = covariances(batch._replace(rows=batch.rows[0].detach()))
        center = mean if self.center is None else finite_or(self.center.to(mean), mean)
        covariance = own if self.covariance is None else finite_or(self.covariance.to(own), own)
        if self.training:
            if not self.fixed:
                self.center = finite_or(center.lerp(mean, 1 - self.momentum), center)
            self.covariance = finite_or(covariance.lerp(own, 1 - self.momentum), covariance)
        return center, covariance

    def _outside(self, scores: Tensor, share: float) -> Tensor:
        """The soft boundary's part of each row."""
        everything, _ = all_gather_rows_with_grad(scores.detach().unsqueeze(1))
        own = everything.sqrt().quantile(1 - share)
        radius = own if self.radius is None else finite_or(self.radius.to(own), own)
        if self.training:
            self.radius = finite_or(own, radius)
        return radius.square() + (scores - radius.square()).relu() / share

    @property
    def value_at_perfection(self) -> float:
        """``nan``: it depends on the number of features, see :meth:`at_perfection`."""
        return math.nan

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it depends on the number of features, see :meth:`at_collapse`."""
        return math.nan

    def at_perfection(self, rows: int, dim: int) -> float:
        """The minimum, with all features of one spread about a center that is their mean."""
        pull, push = self.coefficients["distance"] * (rows - 1) / rows, self.coefficients["variance"]
        spread = max(math.sqrt(EPS), min(1.0, push / (2 * pull))) if pull > 0 else 1.0
        return dim * (pull * (spread**2 - EPS) + push * (1 - spread))

    def at_collapse(self, rows: int, dim: int) -> float:
        """All rows at the center: nothing but the hinge."""
        return self.coefficients["variance"] * dim * (1 - math.sqrt(EPS))

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        coefficients = ", ".join(f"{name}={value}" for name, value in self.coefficients.items())
        return f"{coefficients}, soft_boundary={self.soft_boundary}, momentum={self.momentum}"
