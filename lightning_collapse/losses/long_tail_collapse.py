"""Neural collapse of long-tailed classes, as a loss: two terms on features and learned class means."""

import math

import torch
from torch import Tensor, nn

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.labels import count_classes, named_rows
from lightning_collapse.losses.support.rows import lengths, sum_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_whole


@full_precision
def long_tail_collapse_terms(features: Tensor, labels: Tensor, means: Tensor) -> dict[str, Tensor]:
    """The two terms of :class:`LongTailCollapse`, unweighted.

    Collective: every process must call it; two all-reduces, of ``C`` and of 3 numbers.

    Args:
        features: Shape ``(N, D)``, with at least one row over all processes.
        labels: Class of each row, integers of shape ``(N,)``; rows whose label names no class, such as -100, are left
            out.
        means: The means of the classes, equal on all processes, shape ``(C, D)``.

    Returns:
        Scalars ``within`` and ``between``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If ``features`` is not a matrix as wide as the means, the labels are not integers, one per row, or
            if there is no row over all processes.

    Example:
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> labels, means = torch.tensor([0, 0, 1, 1]), torch.eye(2, 3)
        >>> {name: round(value.item(), 3) for name, value in long_tail_collapse_terms(features, labels, means).items()}
        {'within': 2.373, 'between': -3.142}
    """
    (features,) = separate_views("long_tail_collapse_terms", features=features)
    classes, dim = means.shape
    if features.shape[1] != dim:
        raise ValueError(
            f"`features` of `long_tail_collapse_terms` must be as wide as the class means, {dim}, got"
            f" {features.shape[1]}. Set `dim` to the width of the layer."
        )
    labels, named = named_rows("long_tail_collapse_terms", features, labels, classes)
    counts = count_classes(labels, named, classes, like=features)
    distances = (features - means[labels]).square().sum(dim=1) / counts[labels].clamp_min(1)
    within, _ = sum_of_rows("long_tail_collapse_terms", distances.unsqueeze(1), named)
    return {"within": within.squeeze(0) / classes, "between": -_angles_to_the_nearest(means).mean()}


class LongTailCollapse(AntiCollapseLoss):
    r"""Rows go to the mean of their class, whatever its size, and the means apart, to be added to the cross-entropy.

    .. math:: \lambda_1 \tfrac{1}{C} \sum_c \tfrac{1}{n_c} \sum_{i \in c} \|h_i - m_c\|^2
        - \lambda_2 \tfrac{1}{C} \sum_c \min_{c' \ne c} \angle(m_c - \bar m,\, m_{c'} - \bar m)

    with :math:`n_c` rows of the class in the global batch; a class without rows adds nothing to the first term. The
    means :math:`m_c` are parameters. The second term turns them towards a simplex, and features feel it through the
    first one only. Terms ``within`` and ``between``.

    The angle is computed without the arc cosine, whose published clamp leaves means that coincide nearly, and ought to
    part, without a gradient. Means that coincide exactly have none. The authors optimize the means with the gradient
    divided by :math:`\lambda_1`: with SGD that is a parameter group of ``lr / within``.

    Args:
        num_classes: Number of classes ``C``.
        dim: Width ``D`` of the features.
        within: Coefficient λ₁; that of the authors' code by default.
        between: Coefficient λ₂; that of the authors' code by default.

    Attributes:
        means: The class means, a parameter of shape ``(C, D)``, drawn from a standard normal distribution.

    Raises:
        ValueError: If there are fewer than two classes.

    References:
        Liu et al., *Inducing Neural Collapse in Deep Long-tailed Learning*, AISTATS 2023.
        https://arxiv.org/abs/2302.12453, code at https://github.com/Pepper-lll/NCfeature.

    Example:
        >>> loss = LongTailCollapse(num_classes=3, dim=2)
        >>> _ = loss.means.data.copy_(torch.tensor([[0.0, 2.0], [3.0**0.5, -1.0], [-(3.0**0.5), -1.0]]))
        >>> rows = loss.means.detach()  # on a simplex, each row on its mean
        >>> bool((loss(rows, torch.arange(3)) - loss.value_at_perfection).abs() < 1e-6)
        True
    """

    source = "Liu et al., AISTATS 2023, arXiv 2302.12453; its class means are trained with the model"
    takes_labels = "classes"

    def __init__(self, num_classes: int, dim: int, within: float = 0.01, between: float = 0.1) -> None:
        super().__init__()
        require_whole(2, num_classes=num_classes)
        self.means = nn.Parameter(torch.randn(num_classes, dim))
        self.coefficients = {"within": within, "between": between}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`long_tail_collapse_terms`; features of shape ``(N, D)`` and labels ``(N,)``."""
        features, labels = views
        return long_tail_collapse_terms(features, labels, self.means)

    @property
    def value_at_perfection(self) -> float:
        """Rows on their means, means on a simplex: ``-between * acos(-1 / (C - 1))``."""
        return -self.coefficients["between"] * math.acos(-1 / (len(self.means) - 1))

    @property
    def value_at_collapse(self) -> float:
        """0: all rows on one point, and all means there too."""
        return 0.0

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        classes, dim = self.means.shape
        return f"num_classes={classes}, dim={dim}, " + ", ".join(f"{k}={v}" for k, v in self.coefficients.items())


def _angles_to_the_nearest(means: Tensor) -> Tensor:
    """Angle ``(C,)`` between each mean and the one nearest in direction, seen from their center; 0 if all coincide."""
    centered = means - means.mean(dim=0)
    length = lengths(centered).unsqueeze(1)
    some = length > 0
    directions = torch.where(some, centered / torch.where(some, length, 1.0), 0.0)
    with torch.no_grad():
        nearest = (directions @ directions.T).fill_diagonal_(-2.0).argmax(dim=1)
    others = directions[nearest]
    apart, together = lengths(directions - others), lengths(directions + others)
    # the half angle of unit vectors has this tangent, and a slope that is finite at every angle
    return 2 * torch.atan2(apart, torch.where(apart + together > 0, together, 1.0))
