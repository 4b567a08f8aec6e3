"""Class means about their center, missing classes and blocks of pairs: what the measures of neural collapse share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from inspect import signature
from typing import NamedTuple, ParamSpec, cast

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision

P = ParamSpec("P")


class CenteredMeans(NamedTuple):
    """Class means less a center, or as they are.

    Attributes:
        rows: Shape ``(C, D)``; zero for a missing class.
        present: Which classes are there, boolean ``(C,)``.
        classes: How many, 0-dimensional, in the dtype of the rows.
    """

    rows: Tensor
    present: Tensor
    classes: Tensor


def present_rows(means: Tensor, counts: Tensor | None) -> CenteredMeans:
    """Class means as they are, in the precision sums are kept in, zero where a class is missing.

    Args:
        means: Shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; a class without rows is missing. All are there if ``None``.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if means.ndim != 2 or (counts is not None and counts.shape != means.shape[:1]):
        shape = None if counts is None else tuple(counts.shape)
        raise ValueError(f"`means` must have shape (C, D) and `counts` (C,), got {tuple(means.shape)} and {shape}.")
    present = torch.ones_like(means[:, 0], dtype=torch.bool) if counts is None else counts > 0
    rows = means.to(accumulation_dtype(means.device))
    if counts is not None:
        rows = torch.where(present.unsqueeze(1), rows, 0.0)
    return CenteredMeans(rows, present, present.sum().to(rows.dtype))


def centered_means(means: Tensor, counts: Tensor | None, global_mean: Tensor | None = None) -> CenteredMeans:
    """:func:`present_rows` about ``global_mean`` ``(D,)``, by default the mean of the means that are there.

    A mean that differs from the center by no more than the rounding of the means is at the center.
    """
    rows, present, classes = present_rows(means, counts)
    center = rows.sum(dim=0) / classes if global_mean is None else global_mean.to(rows)
    resolution = 16 * torch.finfo(means.dtype).eps * torch.linalg.vector_norm(rows.detach(), dim=1).amax()
    rows = rows - center
    # not "is greater", which would take NaN for the center
    at_center = torch.linalg.vector_norm(rows.detach(), dim=1) <= resolution
    return CenteredMeans(rows.mul_((present & ~at_center).unsqueeze(1)), present, classes)


def rounding_variance(
    means: Tensor, within: Tensor | None, counts: Tensor | None, resolution: float | Tensor | None
) -> Tensor:
    r"""What rounding may add to the variance of each feature, ``(D,)``: :math:`\epsilon^2 E[x_j^2]`.

    Twice the largest error of one number, squared: room for skewed features and for classes larger than most. A
    direction along which features vary by no more has no variance but rounding: behind a LayerNorm in ``bfloat16``
    the one of equal components, which is exactly constant in real numbers.

    Raises:
        ValueError: If a shape does not fit.
    """
    rows, _, classes = present_rows(means, counts)
    dim = rows.shape[1]
    if within is not None and within.shape != (dim, dim):
        raise ValueError(f"`within` must have shape ({dim}, {dim}), got {tuple(within.shape)}.")
    square = rows.square().sum(dim=0) / classes
    eps = torch.finfo(means.dtype).eps if resolution is None else resolution
    return eps**2 * (square if within is None else square + within.diagonal())


def unit(rows: Tensor) -> Tensor:
    """Rows ``(..., D)`` on the unit sphere; NaN where there is no direction."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / norms


class PairBlock(NamedTuple):
    """Some pairs of rows: all of two ranges of rows as a matrix, or single ones as a vector.

    Attributes:
        first: Rows on one side, a range or indices.
        second: Rows on the other side.
        pairs: Which elements are pairs of different present classes, boolean.
    """

    first: slice | Tensor
    second: slice | Tensor
    pairs: Tensor

    def products(self, rows: Tensor) -> Tensor:
        """Inner products of rows ``(C, D)``."""
        if self.pairs.ndim == 1:
            return (rows[self.first] * rows[self.second]).sum(dim=1)
        return rows[self.first] @ rows[self.second].T

    def sums(self, values: Tensor) -> Tensor:
        """Sums of numbers of the classes, ``(C,)``."""
        first = values[self.first]
        return (first if self.pairs.ndim == 1 else first.unsqueeze(1)) + values[self.second]


def pair_blocks(present: Tensor, tile: int, sample: int | None = None) -> Iterator[PairBlock]:
    """All pairs of different present classes, each once, as blocks of at most ``tile`` by ``tile``.

    Or ``sample`` of them, ordered ones at random with repeats: the same on every process and in every call, without a
    number of anybody's random state.
    """
    if sample is not None:
        yield _random_pairs(present, sample)
        return
    index = torch.arange(len(present), device=present.device)
    for i in range(0, len(present), tile):
        for j in range(i, len(present), tile):
            a, b = slice(i, i + tile), slice(j, j + tile)
            yield PairBlock(a, b, present[a].unsqueeze(1) & present[b] & (index[a].unsqueeze(1) < index[b]))


def _random_pairs(present: Tensor, sample: int) -> PairBlock:
    draws = torch.rand(2, sample, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, other = draws.to(present.device, accumulation_dtype(present.device))
    classes = present.sum()
    a = (first * classes).long()
    b = (a + 1 + (other * (classes - 1)).long()) % classes.clamp_min(1)
    order = torch.argsort(present.long(), descending=True, stable=True)  # those that are there come first
    return PairBlock(order[a.clamp_max(len(order) - 1)], order[b], (classes > 1).expand(sample))


def in_input_precision(fn: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Autocast off, and the result in the dtype of the function's first argument, at least ``float32``.

    A keyword ``resolution`` that is not given is the ``eps`` of that dtype.
    """
    computed = full_precision(fn)
    name, *others = signature(fn).parameters

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first = cast(Tensor, args[0] if args else kwargs[name])
        if "resolution" in others and kwargs.get("resolution") is None:
            kwargs["resolution"] = torch.finfo(first.dtype).eps
        return computed(*args, **kwargs).to(torch.promote_types(first.dtype, torch.float32))

    return wrapper
