"""Mergeable units: units that could be one, and the network in which they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.registry import register_measure

TILE = 1 << 22
"""Most distances at a time: it bounds the memory."""


@register_measure(
    kind="weights",
    range="0 to 1",
    collapsed="near 1",
    source="Chen et al., ICLR 2024, arXiv 2310.06756",
    flops=lambda rows, columns: 4.0 * rows * rows * columns,
)
@full_precision
def mergeable_share(weight: Tensor, outgoing: Tensor | None = None, share: float = 0.1) -> Tensor:
    r"""Share of the units of a layer that have a partner near enough to be merged with.

    .. math:: \#\{i : \min_{j \ne i} \|w_i - w_j\|^2 \le 0.1 \max_{k, l} \|w_k - w_l\|^2\} / O

    Args:
        weight: What goes into each unit, shape ``(O, ...)``; :func:`merge_units` is exact where that is equal.
        outgoing: What comes out of each, shape ``(P, O, ...)``, to count into the distance as published; a monitor does
            not know who reads a layer, and leaves it out.
        share: The published share of the largest squared distance.

    Returns:
        0-dimensional, 0 (every unit stands alone, as random ones with more than a few inputs do) to 1 (everyone has a
        partner); NaN for fewer than two units, or where one is not finite.

    Raises:
        ValueError: If ``share`` is not between 0 and 1.

    References:
        Chen et al., *Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its
        Interpretation Using Category Theory*, ICLR 2024 (iterative feature merging). https://arxiv.org/abs/2310.06756

    Example:
        >>> mergeable_share(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 4.0], [9.0, 9.0]]))
        tensor(0.5000)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be from 0 to 1, got {share}.")
    units = weight.flatten(1)
    if outgoing is not None:
        units = torch.cat([units, outgoing.transpose(0, 1).flatten(1)], dim=1)
    if len(units) < 2:
        return weight.new_full((), torch.nan)
    units = units.to(accumulation_dtype(units.device))
    units = units - units.mean(dim=0)  # about their mean, where less cancels
    nearest, largest = [], []
    for start in range(0, len(units), max(TILE // len(units), 1)):
        squares = _squares(units[start : start + max(TILE // len(units), 1)], units)
        largest.append(squares.amax())
        squares.diagonal(start).fill_(torch.inf)
        nearest.append(squares.amin(dim=1))
    near = torch.cat(nearest) <= share * torch.stack(largest).amax()
    return torch.where(units.isfinite().all(), near.to(weight.dtype).mean(), torch.nan)


class MergedUnits(NamedTuple):
    """A layer and its consumer with fewer units between them, from :func:`merge_units`.

    Attributes:
        first: What goes into the units that are left, ``(M, ...)``.
        bias: Their biases ``(M,)``, or ``None``.
        second: What reads them, ``(P, M, ...)``.
        groups: For every old unit the new one it is part of, ``(O,)``.
    """

    first: Tensor
    bias: Tensor | None
    second: Tensor
    groups: Tensor


@torch.no_grad()
def merge_units(
    first: Tensor, second: Tensor, bias: Tensor | None = None, share: float = 0.1, most: float = 0.5
) -> MergedUnits:
    """Merge units of a layer, nearest pair first, as long as pairs are near and not too many units are gone.

    What goes into a group of units is averaged, what reads them is summed. So a merge of units with equal incoming
    weights and biases changes nothing, whatever the activation function between the two layers is. The published code
    sums the former and averages the latter, which is exact for rectifiers only; it also counts outgoing weights into
    the distance, which decide nothing here.

    Args:
        first: Weight of a layer, shape ``(O, ...)``.
        second: Weight of the layer that alone reads it, elementwise functions between, shape ``(P, O, ...)``.
        bias: Of the first layer, shape ``(O,)``; what else acts on single units (a normalization) must be folded in.
        share: Pairs are merged whose squared distance is at most this share of the largest one.
        most: The largest share of the units that go.

    Returns:
        New tensors; the arguments stay as they are. It reads on the host.

    Raises:
        ValueError: If shapes do not fit, or ``share`` or ``most`` is not between 0 and 1.

    References:
        Chen et al., ICLR 2024 (iterative feature merging), https://arxiv.org/abs/2310.06756; constants are theirs.

    Example:
        >>> first, second = torch.tensor([[1.0], [1.0], [5.0]]), torch.tensor([[1.0, 2.0, 4.0]])
        >>> merged = merge_units(first, second)
        >>> merged.first.tolist(), merged.second.tolist(), merged.groups.tolist()
        ([[1.0], [5.0]], [[3.0, 4.0]], [0, 0, 1])
    """
    for name, value in (("share", share), ("most", most)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be from 0 to 1, got {value}.")
    count = len(first)
    if second.ndim < 2 or second.shape[1] != count or (bias is not None and bias.shape != (count,)):
        raise ValueError(
            f"`second` must have a column and `bias` an element for each of the {count} rows of `first`, got shapes"
            f" {tuple(second.shape)} and {bias if bias is None else tuple(bias.shape)}."
        )
    groups = _groups(first, bias, share, min(int(most * count), count - 1))
    places, groups, sizes = torch.unique(groups, return_inverse=True, return_counts=True)

    def gathered(units: Tensor) -> Tensor:
        return units.new_zeros(len(places), *units.shape[1:]).index_add_(0, groups, units)

    def averaged(units: Tensor) -> Tensor:
        mean: Tensor = gathered(units) / sizes.to(units.dtype).reshape(-1, *[1] * (units.ndim - 1))
        return mean

    summed = gathered(second.transpose(0, 1)).transpose(0, 1)
    return MergedUnits(averaged(first), None if bias is None else averaged(bias), summed, groups)


def _groups(first: Tensor, bias: Tensor | None, share: float, most: int) -> Tensor:
    """For every unit the first one that it is merged with."""
    units = torch.cat([first.flatten(1), *([] if bias is None else [bias.unsqueeze(1)])], dim=1)
    units = units.to(accumulation_dtype(units.device), copy=True)
    groups = torch.arange(len(units), device=units.device)
    sizes = torch.ones_like(units[:, 0])
    squares = _squares(units, units).fill_diagonal_(torch.inf)  # infinite, too, of units that are gone
    for _ in range(most):
        largest = squares.masked_fill(squares.isinf(), 0.0).amax()
        if not squares.amin() <= share * largest:
            break
        near, far = sorted(divmod(int(squares.argmin()), len(units)))
        groups[groups == far] = near
        units[near].lerp_(units[far], float(sizes[far] / (sizes[near] + sizes[far])))
        sizes[near] += sizes[far]
        squares[far] = squares[:, far] = torch.inf
        moved = _squares(units[near : near + 1], units)[0].masked_fill(squares[near].isinf(), torch.inf)
        squares[near] = squares[:, near] = moved
    return groups


def _squares(some: Tensor, units: Tensor) -> Tensor:
    """Squared distances of some units to all of them."""
    energy = some.square().sum(dim=1, keepdim=True) + units.square().sum(dim=1)
    squares = energy - 2 * some @ units.T
    # what rounding leaves of two units that are equal
    floor = torch.finfo(units.dtype).eps * units.shape[1] * energy
    return torch.where(squares <= floor, 0.0, squares)
