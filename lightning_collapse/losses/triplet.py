"""Batch-hard triplet loss: the farthest row of the own class is to be nearer than the nearest of any other."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.labels import gather_classes, named_rows
from lightning_collapse.losses.support.pairs import gather_rows, squared_distances
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive

FLOOR = 1e-12
"""Of a squared distance: its root has a finite slope."""
PATIENCE = 5
"""Points in a row that are no accident."""


@full_precision
def batch_hard_triplet(features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    r"""Mean over anchors of the margin by which their hardest triplet is violated.

    .. math:: \frac{1}{|A|} \sum_{a \in A} \Big[ m + \max_{p} \|z_a - z_p\| - \min_{n} \|z_a - z_n\| \Big]_+

    over all rows of the global batch that have another one of their class and one of another class. Without a margin
    :math:`\log(1 + e^x)` of the difference of distances stands in place of :math:`[m + x]_+`. Triplets are mined among
    the rows of all processes, by distances in double precision; the two that count are taken from differences of rows,
    with a floor of 1e-6.

    Collective: every process must call it; gathers all rows with their gradient, and all-reduces of ``N`` and of three
    numbers.

    Args:
        features: Shape ``(N, D)``, with at least one row over all processes.
        labels: Class of each row, integers of shape ``(N,)``; rows whose label is negative, such as -100, are left out.
        margin: :math:`m`; ``None``, which the paper finds best, for the soft margin.

    Returns:
        Scalar, at least ``float32``, 0 or more, the value on the global batch; 0 if no row has a triplet. If all rows
        are equal it is :math:`m`, or :math:`\log 2`: less than at random weights, so that collapse is downhill.

    Raises:
        ValueError: If ``features`` is not a matrix, the labels are not integers, one per row, or if there is no row
            over all processes.

    References:
        Hermans et al., *In Defense of the Triplet Loss for Person Re-Identification*, 2017.
        https://arxiv.org/abs/1703.07737

    Example:
        >>> features, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
        >>> batch_hard_triplet(features, labels, margin=1.5)  # of 0: 1.5 + 1 - 3, of 1: 1.5 + 1 - 2
        tensor(0.2500)
    """
    (features,) = separate_views("batch_hard_triplet", features=features)
    labels, named = named_rows("batch_hard_triplet", features, labels)
    features = torch.where(named.unsqueeze(1), features, 0.0)
    everything, first = gather_rows("batch_hard_triplet", features, least=1)
    keys = gather_classes(labels, named, first, len(everything))
    with torch.no_grad():
        squares = squared_distances(features, everything, first)
        own = torch.arange(first, first + len(features), device=features.device).unsqueeze(1)
        same = labels.unsqueeze(1) == keys
        positives = same & (own != torch.arange(len(everything), device=features.device))
        negatives = ~same & (keys >= 0)
        counted = named & positives.any(dim=1) & negatives.any(dim=1)
        farthest = squares.masked_fill(~positives, -1.0).argmax(dim=1)
        nearest = squares.masked_fill(~negatives, torch.inf).argmin(dim=1)
    ahead, behind = (_distances(features, everything.index_select(0, other)) for other in (farthest, nearest))
    excess = ahead - behind
    values = softplus(excess, threshold=50.0) if margin is None else (margin + excess).relu()
    return mean_of_rows("batch_hard_triplet", values.unsqueeze(1), counted).squeeze(0)


class BatchHardTriplet(AntiCollapseLoss):
    """Module form of ``batch_hard_triplet``; it says when it collapses.

    Terms ``triplet`` and, for the curves alone, ``above_collapse``: how far the loss is above the value that it takes
    where all rows are equal. It starts above, falls to it, and below it once the hardest pairs are told apart. Where
    it stays within 1 % of that value at five logging steps in a row there is a warning.

    Args:
        margin: By how much the classes are to be apart; ``None`` for the soft margin.

    Raises:
        ValueError: If ``margin`` is not positive.

    References:
        Hermans et al., *In Defense of the Triplet Loss for Person Re-Identification*, 2017.
        https://arxiv.org/abs/1703.07737

    Example:
        >>> loss, labels = BatchHardTriplet(margin=0.2), torch.tensor([0, 0, 1, 1])
        >>> {name: round(value.item(), 3) for name, value in loss.terms(torch.ones(4, 3), labels).items()}
        {'triplet': 0.2, 'above_collapse': 0.0}
    """

    takes_labels = "classes"
    source = "Hermans et al., 2017, arXiv 1703.07737, soft margin; `margin=` for the hinge"

    def __init__(self, margin: float | None = None) -> None:
        super().__init__()
        if margin is not None:
            require_positive(margin=margin)
        self.margin = margin
        self.coefficients = {"triplet": 1.0, "above_collapse": 0.0}
        self._near = 0

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``triplet`` and ``above_collapse``, for features of shape ``(N, D)`` and labels ``(N,)``."""
        features, labels = views
        value = batch_hard_triplet(features, labels, self.margin)
        return {"triplet": value, "above_collapse": value.detach() - self.value_at_collapse}

    def remark(self, values: Mapping[str, float]) -> str | None:
        """Tell that the loss stays where all rows are equal."""
        end = self.value_at_collapse
        self._near = self._near + 1 if abs(values.get("triplet", math.inf) - end) <= 0.01 * end else 0
        if self._near != PATIENCE:
            return None
        return (
            f"the loss stays within 1 % of {end:.3g}, its value where all rows are equal. Lower the learning rate, or"
            " begin with a loss that looks at all pairs, such as `SupCon`."
        )

    @property
    def value_at_collapse(self) -> float:
        """The margin, or ``log(2)`` without one."""
        return math.log(2) if self.margin is None else self.margin

    def extra_repr(self) -> str:
        """Show the hyperparameter in ``print(model)``."""
        return f"margin={self.margin}"


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    return (rows - others).square().sum(dim=1).clamp_min(FLOOR).sqrt()
