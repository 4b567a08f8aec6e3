"""Soft entropy regularization by groups (Happy): predictions are neither all of old classes nor all of a few."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive, require_whole
from lightning_collapse.utilities.registry import register_loss


@full_precision
def group_entropy_terms(logits: Tensor, old_classes: int | None = None, temperature: float = 0.1) -> dict[str, Tensor]:
    r"""The three terms of :class:`GroupEntropy`, unweighted, from the mean prediction :math:`p` of the global batch.

    With :math:`P_g` the mass of a group, old classes or new ones, and :math:`C_g` how many these are:

    .. math:: \text{groups} = \log 2 + \sum_g P_g \log P_g, \quad
        \text{old}, \text{new} = \log C_g + \sum_{c \in g} \tfrac{p_c}{P_g} \log \tfrac{p_c}{P_g}

    Collective: every process must call it; one all-reduce of ``C + 2`` numbers.

    Args:
        logits: Shape ``(N, C)``, old classes first; cosines as published.
        old_classes: How many of the columns are old, from 1 to ``C - 1``; half of them, rounded up, if ``None``.
        temperature: Of the softmax, 0.1 as published.

    Returns:
        Scalars ``groups``, ``old`` and ``new``, at least ``float32``, 0 or more: 0 at equal masses and where a group is
        even inside. A group of one class, or of mass 0, reads 0 inside, and at mass 0 no gradient.

    Raises:
        ValueError: If ``logits`` is not a matrix, an argument is out of range, or there is no row over all processes.

    Example:
        >>> terms = group_entropy_terms(torch.zeros(1, 10), old_classes=8)  # uniform
        >>> [round(2 * terms["groups"].item(), 3), *(round(terms[name].item(), 3) for name in ("old", "new"))]
        [0.385, 0.0, 0.0]
    """
    require_positive(temperature=temperature)
    (logits,) = separate_views("group_entropy_terms", logits=logits)
    old_classes = (logits.shape[1] + 1) // 2 if old_classes is None else old_classes
    require_whole(1, old_classes=old_classes)
    if logits.shape[1] <= old_classes:
        raise ValueError(
            f"`old_classes` must be below the number of logits, got {old_classes} of {logits.shape[1]}. Before new"
            " classes have come there is nothing to balance."
        )
    mean = mean_of_rows("group_entropy_terms", (logits / temperature).softmax(dim=1))
    parts = torch.split(mean, [old_classes, len(mean) - old_classes])
    masses = torch.stack([part.sum() for part in parts])
    inside = [_unevenness(part, mass) for part, mass in zip(parts, masses, strict=True)]
    return {"groups": math.log(2) + _plogp(masses), "old": inside[0], "new": inside[1]}


@register_loss
class GroupEntropy(AntiCollapseLoss):
    r"""Push of the mean prediction towards equal shares of old and new classes, and evenness within either.

    .. math:: a \cdot \text{groups} + b \cdot \text{old} + c \cdot \text{new}

    see ``group_entropy_terms``. Its least value, 0, is at half the mass on the new classes, whatever the counts: a
    uniform prediction over 8 old and 2 new classes reads 0.385. Without new mass ``groups`` reads :math:`\log 2`.

    Args:
        old_classes: How many columns, the first ones, are of old classes; half of them, rounded up, if ``None``.
        temperature: Of the softmax.
        groups: Coefficient of the term between the groups; 2, 1, 1 are the published three.
        old: Coefficient of the term within old classes.
        new: Coefficient of the term within new classes.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Ma et al., *Happy: A Debiased Learning Framework for Continual Generalized Category Discovery*, NeurIPS 2024.
        https://arxiv.org/abs/2410.06535, code at https://github.com/mashijie1028/Happy-CGCD, where log 0 is not caught.

    Example:
        >>> logits = torch.tensor([[50.0, 50.0, 0.0, 0.0]])
        >>> round(GroupEntropy(old_classes=2)(logits).item(), 4)  # 2 log 2
        1.3863
    """

    source = "Ma et al., NeurIPS 2024, arXiv 2410.06535; of logits, old classes first"

    def __init__(
        self,
        old_classes: int | None = None,
        temperature: float = 0.1,
        groups: float = 2.0,
        old: float = 1.0,
        new: float = 1.0,
    ) -> None:
        super().__init__()
        if old_classes is not None:
            require_whole(1, old_classes=old_classes)
        require_positive(temperature=temperature)
        self.old_classes, self.temperature = old_classes, temperature
        self.coefficients = {"groups": groups, "old": old, "new": new}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`group_entropy_terms`; logits of shape ``(N, C)``."""
        return group_entropy_terms(views[0], self.old_classes, self.temperature)

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it depends on the number of classes, see :meth:`at_collapse`."""
        return math.nan

    def at_collapse(self, rows: int, dim: int) -> float:
        """All logits equal: only the sizes of the groups count."""
        old = ((dim + 1) // 2 if self.old_classes is None else self.old_classes) / dim
        shares = old, 1 - old
        return self.coefficients["groups"] * (math.log(2) + sum(p * math.log(p) for p in shares))

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"old_classes={self.old_classes}, temperature={self.temperature}"


def _plogp(shares: Tensor) -> Tensor:
    # the floor: of 0 the logarithm has no gradient, and 0 times that is no number
    return (shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum()


def _unevenness(part: Tensor, mass: Tensor) -> Tensor:
    """Divergence of a group's shares from even ones; 0 of a group without mass."""
    empty = mass <= torch.finfo(mass.dtype).tiny ** 0.75  # and not what is no number
    shares = part / torch.where(empty, 1.0, mass)
    return torch.where(empty, 0.0, math.log(len(part)) + _plogp(shares))
