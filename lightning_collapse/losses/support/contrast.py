"""Contrast: similarities of the rows of two views to all others, over all processes, and masked sums of exponents."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.losses.support.pairs import gather_rows
from lightning_collapse.losses.support.products import inner_products
from lightning_collapse.losses.support.rows import unit_rows


class Contrast(NamedTuple):
    """Rows of both views as anchors, those of all processes as keys; a key is no key of itself.

    Attributes:
        logits: Cosines over the temperature, shape ``(2 N, 2 M)``.
        others: Which keys are not the anchor itself, boolean of the same shape.
        partner: Where the other view of each anchor is among the keys, ``(2 N,)``.
        extra: What came along with the keys, without gradient, ``(2 M, E)``.
        first: Where the rows of this process begin among the ``M`` of each view.
    """

    logits: Tensor
    others: Tensor
    partner: Tensor
    extra: Tensor
    first: int

    def other_view(self) -> Tensor:
        """Similarity of each anchor to its other view, ``(2 N,)``."""
        return self.logits.gather(1, self.partner.unsqueeze(1)).squeeze(1)


def contrast(function: str, views: Tensor, temperature: float, extra: Tensor | None = None, least: int = 1) -> Contrast:
    """Compare the rows of two views with all others.

    Collective: every process must call it; gathers all rows with their gradient, two messages.

    Args:
        function: What to call the caller in messages.
        views: Shape ``(2, N, D)``; ``N`` may differ between processes.
        temperature: What cosines are divided by.
        extra: Numbers of each row that travel along, ``(2, N, E)``.
        least: How many rows a view needs, over all processes.

    Raises:
        TooFewRowsError: If there are fewer.
    """
    units = unit_rows(views)
    dim = units.shape[2]
    if extra is not None:
        units = torch.cat([units, extra.detach().to(units.dtype)], dim=2)
    everything, first = gather_rows(function, units, least)
    n, m = units.shape[1], everything.shape[1]
    logits = inner_products(units[..., :dim].flatten(0, 1), everything[..., :dim].flatten(0, 1)) / temperature
    own = torch.arange(first, first + n, device=views.device)
    anchors = torch.cat([own, own + m])
    others = anchors.unsqueeze(1) != torch.arange(2 * m, device=views.device)
    return Contrast(logits, others, torch.cat([own + m, own]), everything[..., dim:].detach().flatten(0, 1), first)


def masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over what a mask leaves of each row: minus infinity of none, no gradient.

    Args:
        logits: Shape ``(N, M)``.
        mask: Boolean, of the same shape.
    """
    some = mask.any(dim=1)
    kept = torch.where(mask | ~some.unsqueeze(1), logits, -torch.inf)  # of none at all the derivative is no number
    return torch.where(some, kept.logsumexp(dim=1), -torch.inf)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over what a mask leaves of each row, 0 of none; from ``(N, M)`` to ``(N,)``."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
