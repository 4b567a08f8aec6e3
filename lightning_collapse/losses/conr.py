"""Contrastive regularizer for imbalanced regression (ConR): rows of far targets are no neighbours in feature space."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.contrast import contrast, masked_logsumexp
from lightning_collapse.losses.support.labels import require_labels
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import require_matrices, stack_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_not_negative, require_positive


@full_precision
def conr_loss(
    first: Tensor,
    second: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | None = None,
    window: float = 1.0,
    temperature: float = 0.07,
    slope: float = 0.01,
) -> Tensor:
    r"""Contrast of rows of near targets with rows that are predicted alike although their targets are far.

    .. math:: \frac{1}{2N} \sum_j \frac{-1}{|P_j|} \sum_{p \in P_j} \log \frac{e^{s_{jp}}}
        {\sum_{p' \in P_j} e^{s_{jp'}} + \sum_{q \in Q_j} \eta_j e^{\epsilon |y_j - y_q|} e^{s_{jq}}}

    with cosines over the temperature :math:`s`, :math:`P_j` the other rows with :math:`|y_j - y_p| \le \omega` and
    :math:`Q_j` those with :math:`|y_j - y_q| > \omega` and predictions :math:`|\hat y_j - \hat y_q| \le \omega`. A row
    without any of the second, or of the first, adds 0. Unlike the released code it counts nothing that is in neither
    set, no weight twice, and has no quotient ``0 / 0``.

    Collective: every process must call it; gathers all rows with their gradient, and one all-reduce of three numbers.

    Args:
        first: Representations of one view, shape ``(N, D)``, with at least one row over all processes.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        targets: Of each sample, shape ``(N,)``; samples whose target is not finite are left out, and so are those
            whose weight is not finite or not positive.
        predictions: Of each row, ``(2, N)``; they get no gradient.
        weights: :math:`\eta` of each sample, ``(N,)``, larger for rare targets; 1 by default.
        window: :math:`\omega`, in units of the targets; the authors' values for AgeDB (years) by default.
        temperature: What cosines are divided by.
        slope: :math:`\epsilon`.

    Returns:
        Scalar, at least ``float32``, 0 or more, the value on the global batch.

    Raises:
        ValueError: If a shape is another one, or if there is no row over all processes.

    References:
        Keramati et al., *ConR: Contrastive Regularizer for Deep Imbalanced Regression*, ICLR 2024.
        https://arxiv.org/abs/2309.06651

    Example:
        >>> same = torch.ones(2, 3)  # one point and one prediction, and targets that are far from each other
        >>> conr_loss(same, same, torch.tensor([0.0, 9.0]), torch.zeros(2, 2)).round(decimals=3)  # log(1 + 2 exp(.09))
        tensor(1.1600)
    """
    views = stack_views("conr_loss", first=first, second=second)
    if predictions.shape != views.shape[:2]:
        raise ValueError(
            f"`predictions` of `conr_loss` must have shape {tuple(views.shape[:2])}, one number for each row, got"
            f" {tuple(predictions.shape)}. Pass a head that returns one."
        )
    require_labels("conr_loss", targets, views.shape[1], "targets")
    targets = targets.to(views.dtype)
    weights = torch.ones_like(targets) if weights is None else weights
    if weights.shape != targets.shape:
        raise ValueError(
            f"`weights` of `conr_loss` must have shape {tuple(targets.shape)}, one per row, got {tuple(weights.shape)}."
            " Let `density_weight` return one for each target."
        )
    weights = weights.detach().to(views.dtype)
    counted = targets.isfinite() & weights.isfinite() & (weights > 0)
    weights = torch.where(counted, weights, 1.0)
    views = torch.where(counted.unsqueeze(1), views, 0.0)
    along = torch.stack([targets.expand(2, -1), predictions.detach().to(views.dtype)], dim=2)
    along = torch.cat([torch.where(counted.unsqueeze(1), along, 0.0), counted.expand(2, -1).unsqueeze(2)], dim=2)
    pairs = contrast("conr_loss", views, temperature, extra=along)
    (own_target, own_guess, own_counts), (target, guess, counts) = along.flatten(0, 1).unbind(1), pairs.extra.unbind(1)
    others = pairs.others & (counts > 0) & (own_counts > 0).unsqueeze(1)
    apart = (own_target.unsqueeze(1) - target).abs()
    positives = others & (apart <= window)
    negatives = others & (apart > window) & ((own_guess.unsqueeze(1) - guess).abs() <= window)
    push = slope * apart + weights.log().repeat(2).unsqueeze(1)
    total = masked_logsumexp(torch.where(negatives, pairs.logits + push, pairs.logits), positives | negatives)
    count = positives.sum(dim=1)
    complete = (count > 0) & negatives.any(dim=1)
    pulled = torch.where(positives, pairs.logits, 0.0).sum(dim=1) / count.clamp_min(1)
    values = torch.where(complete, torch.where(complete, total, 0.0) - pulled, 0.0)
    return mean_of_rows("conr_loss", values.unsqueeze(1), counted.repeat(2)).squeeze(0)


class ConR(AntiCollapseLoss):
    """Module form of ``conr_loss``, with one term, ``contrast``; beside the loss of a regression.

    Args:
        predict: From rows of features to predictions, ``(N,)`` or ``(N, 1)``, such as the head that follows the layer.
            It is no part of this loss, is called without gradient, and, if it is a module, without its hooks.
        weight: Factor of the term; the authors' β for AgeDB, like the other defaults.
        window: How far targets of one neighbourhood may be apart, in units of the targets.
        temperature: What cosines are divided by.
        slope: How much more those are pushed that are farther.
        density_weight: From targets ``(N,)`` to the weights of rare ones, positive, ``(N,)``.

    Raises:
        ValueError: If ``predict`` cannot be called, or a number is out of its range.

    References:
        Keramati et al., *ConR: Contrastive Regularizer for Deep Imbalanced Regression*, ICLR 2024.
        https://arxiv.org/abs/2309.06651, code at https://github.com/BorealisAI/ConR.

    Example:
        >>> loss = ConR(predict=lambda rows: rows[:, 0])
        >>> views, targets = torch.arange(24.0).reshape(2, 4, 3).sin(), torch.tensor([0.0, 0.5, 3.0, 9.0])
        >>> round(loss(*views, targets).item(), 3)
        42.43
    """

    views = 2
    takes_labels = "targets"
    source = "Keramati et al., ICLR 2024, arXiv 2309.06651, the authors' values for AgeDB"

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        weight: float = 4.0,
        window: float = 1.0,
        temperature: float = 0.07,
        slope: float = 0.01,
        density_weight: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not callable(predict):
            raise ValueError(f"`predict` must be a function or the head of the model, got {predict!r}.")
        if not (density_weight is None or callable(density_weight)):
            raise ValueError(f"`density_weight` must be a function of the targets, or None, got {density_weight!r}.")
        require_positive(window=window, temperature=temperature)
        require_not_negative(slope=slope)
        self._predict: tuple[Any, ...] = (predict,)  # in a tuple: a module would become a part of this one
        self.window, self.temperature, self.slope = window, temperature, slope
        self.density_weight = density_weight
        self.coefficients = {"contrast": weight}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"contrast": conr_loss(...)}`` for views of shape ``(N, D)`` and targets ``(N,)``."""
        first, second, targets = views
        require_matrices("ConR", first=first, second=second)  # before the head sees them
        with torch.no_grad():
            (predict,) = self._predict
            guesses = [_numbers("predict", getattr(predict, "forward", predict)(view)) for view in (first, second)]
            # not in half precision: autocast refuses to stack some
            both = torch.stack([guess.to(torch.promote_types(guess.dtype, torch.float32)) for guess in guesses])
            weights = None
            if self.density_weight is not None:
                weights = _numbers("density_weight", self.density_weight(targets))
        options = weights, self.window, self.temperature, self.slope
        return {"contrast": conr_loss(first, second, targets, both, *options)}

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it depends on the targets."""
        return math.nan

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        factor = self.coefficients["contrast"]
        return f"weight={factor}, window={self.window}, temperature={self.temperature}, slope={self.slope}"


def _numbers(name: str, found: Any) -> Tensor:
    """What a function of the user's returned, flat."""
    if not isinstance(found, Tensor):
        raise ValueError(f"`{name}` of `ConR` must return a tensor, one number for each row, got {found!r:.50}.")
    return found.flatten()
