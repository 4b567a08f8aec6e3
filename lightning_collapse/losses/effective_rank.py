"""Effective-rank hinge: a floor under the effective rank and the spread of one layer's features."""

import torch
from torch import Tensor

from lightning_collapse.losses.support.jitter import JitteredCovarianceLoss, center_with_jitter, smaller_side
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.registry import register_loss

FLOOR = 1e-3
"""Features whose standard deviation is below this share of the target count as having no rank."""


@full_precision
def effective_rank_terms(
    features: Tensor, target: float = 0.5, target_std: float = 1.0, jitter: float = 1e-5
) -> dict[str, Tensor]:
    """The two terms of :class:`EffectiveRankHinge`, unweighted, on the covariance of this batch.

    Collective: every process must call it; three all-reduces, about ``D * D`` numbers.

    Args:
        features: Representations, shape ``(N, D)``, with at least two rows over all processes.
        target: The floor of the rank, as a share of what isotropic features would read.
        target_std: The floor of the spread, in units of the features.
        jitter: Standard deviation of what is added to tell equal rows apart, in units of the features.

    Returns:
        Scalars ``rank`` and ``spread``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If ``features`` is not a matrix, or if there are fewer than two rows over all processes.

    Example:
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> {name: round(value.item(), 3) for name, value in effective_rank_terms(features, target=1.0).items()}
        {'rank': 0.306, 'spread': 0.185}
    """
    batch = center_with_jitter("effective_rank_terms", features, jitter)
    return _hinges(smaller_side(batch), features.shape[1], batch.samples - 1, target, target_std)


def _hinges(matrix: Tensor, dim: int, freedom: float | Tensor, target: float, target_std: float) -> dict[str, Tensor]:
    trace = matrix.diagonal().sum()
    rank = trace.square() / (matrix.square().sum() + dim * (FLOOR * target_std) ** 4)
    isotropic = dim * freedom / (dim + freedom)
    # without a constant under the root: the gradient of a norm does not fade as the vector shrinks
    spread = torch.where(trace > 0, torch.where(trace > 0, trace / dim, 1.0).sqrt(), 0.0)
    return {"rank": torch.relu(1 - rank / (target * isotropic)), "spread": torch.relu(target_std - spread)}


@register_loss
class EffectiveRankHinge(JitteredCovarianceLoss):
    r"""Keeps the effective rank and the spread of features above a floor; 0 for all that is healthy.

    .. math:: \rho \max\Big(0,\; 1 - \frac{r(C)}{\tau\, r_0}\Big) + \sigma \max\Big(0,\; \gamma -
        \sqrt{\tfrac{1}{D} \operatorname{tr} C}\Big), \qquad
        r(C) = \frac{(\operatorname{tr} C)^2}{\|C\|_F^2 + D (\gamma / 1000)^4}, \quad r_0 = \frac{D (N - 1)}{D + N - 1}

    :math:`r` is the effective rank of order 2 (participation ratio) of the covariance: a lower bound of the entropic
    one, from sums alone, so that nothing is decomposed and nothing waits for the device. :math:`r_0` is what ``N`` rows
    of isotropic features would read. The constant in its denominator makes the rank of no spread 0. Of this package,
    not of a paper.

    The spread's gradient is that of a norm: it does not fade near collapse, where that of VICReg's variance term is
    zero for want of a slope. At *exact* collapse a slope is what ``jitter`` provides; with ``jitter=0`` equal rows stay
    equal, which is a mathematical fact of smooth functions of the covariance. It changes the loss by about
    ``jitter**2`` of the features' variance, and is the same in every step and on every process.

    Args:
        rank: Coefficient ρ.
        spread: Coefficient σ.
        target: The floor τ of the rank, a share above 0 and up to 1.
        target_std: The floor γ of the spread, in units of the features.
        jitter: Standard deviation of what is added to tell equal rows apart, in units of the features.
        momentum: Share of the earlier covariance, see ``JitteredCovarianceLoss``; ``N - 1`` is then
            ``(1 + momentum) / (1 - momentum)`` times that of the batch.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> EffectiveRankHinge()(torch.ones(8, 4))
        tensor(2.0000)
    """

    source = "this package"

    def __init__(
        self,
        rank: float = 1.0,
        spread: float = 1.0,
        target: float = 0.5,
        target_std: float = 1.0,
        jitter: float = 1e-5,
        momentum: float = 0.0,
    ) -> None:
        super().__init__(target_std, jitter, momentum)
        require_positive(target=target)
        if target > 1:
            raise ValueError(f"`target` is a share of the rank of isotropic features and at most 1, got {target}.")
        self.target = target
        self.coefficients = {"rank": rank, "spread": spread}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`effective_rank_terms`; one view of shape ``(N, D)``."""
        (features,) = views
        return self._terms(features)

    @full_precision
    def _terms(self, features: Tensor) -> dict[str, Tensor]:
        batch = center_with_jitter("EffectiveRankHinge", features, self.jitter)
        freedom = (batch.samples - 1) * (1 + self.momentum) / (1 - self.momentum)
        return _hinges(self.blend(batch), features.shape[1], freedom, self.target, self.target_std)

    @property
    def value_at_collapse(self) -> float:
        """No rank and no spread: ``rank + spread * target_std``, 2."""
        return self.coefficients["rank"] + self.coefficients["spread"] * self.target_std

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"{super().extra_repr()}, target={self.target}"
