"""Nearest neighbours, exact: in single precision with a bound on its error, in double where that is too rough."""

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.differentiable_once import differentiable_once

TILE_ELEMENTS = 1 << 20
"""Most numbers of a tile of distances: it bounds the memory."""
DIFFERENCE_ELEMENTS = 1 << 17
"""Most numbers of a tile of differences of rows, which stays in the processor's cache."""
SPARE = 8
"""How many more than wanted are kept, to be measured where single precision cannot tell them apart."""
SMALL = 1 << 16
"""Pairs of points up to which double precision takes no longer than single precision and the proof that it suffices."""
FEW = 256
"""Columns up to which ``topk`` is the fastest way to the largest of them."""
ROUNDINGS = 16
"""Those of a score beside its inner product, and as many again to spare."""
TINY = 2.0**-125
"""More than what underflow takes from a term of an inner product."""


@torch.no_grad()
@full_precision
def nearest_rows(
    points: Tensor, k: int, first: int = 0, count: int | None = None, excluded: Tensor | None = None
) -> Tensor:
    r"""Indices of the ``k`` nearest other points of each, as double precision finds them.

    Distances come from a Gram matrix about the mean. Single precision has it for half the price, and errs in an inner
    product of :math:`D` numbers by at most :math:`\gamma \|x\| \|y\|`, :math:`\gamma = n u / (1 - n u)`, with
    :math:`n = D` roundings of :math:`u = 2^{-24}` [1] and a few more. A point whose ``k``-th neighbour is nearer than
    the next one by more than both may err is done; if only a few more could be meant, these are measured one by one.
    All others are searched again in double precision, which is right to 1e-7 of the points' spread. So is everything
    on an accelerator, which must not be asked how many there are, and where products in single precision turn out to
    be less than that (``torch.set_float32_matmul_precision``).

    Args:
        points: Shape ``(N, D)``.
        k: How many neighbours, below ``N``.
        first: The first point whose neighbours are wanted.
        count: How many points from there on; all by default.
        excluded: Points that are no neighbours, boolean ``(N,)``. If fewer than ``k`` are left, the last places hold
            any of the others.

    Returns:
        Integers, shape ``(count, k)``, the nearest first as far as the precision of the search tells them apart.

    References:
        [1] Higham, *Accuracy and stability of numerical algorithms*, 2nd ed., SIAM 2002, section 3.1.

    Example:
        >>> nearest_rows(torch.tensor([[0.0], [1.0], [3.0]]), k=1).flatten()
        tensor([1, 0, 1])
    """
    count = len(points) - first if count is None else count
    excluded = points.new_zeros(len(points), dtype=torch.bool) if excluded is None else excluded
    found: Tensor = torch.ops.lightning_collapse.nearest_rows(points, k, first, count, excluded)
    return found


@torch.no_grad()
@full_precision
def nearest_distances(features: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Euclidean distances of every row to its ``k`` nearest others; a row that repeats an earlier one does not count.

    The neighbours of :func:`nearest_rows`, measured by the difference of rows, where nothing cancels. Nothing here
    waits for the device. Work ``O(N ** 2 * D)``.

    Args:
        features: Shape ``(N, D)``.
        k: How many neighbours.
        mask: Boolean, shape ``(N,)``: rows to consider.

    Returns:
        Distances ``(N, k)``, ascending, of features divided by their largest deviation from the mean (so that squares
        neither overflow nor vanish); infinite where there are fewer others, and for rows that do not count. Boolean
        ``(N,)``: the rows that count: considered, finite, and no repetition. Boolean ``(N,)``: the repetitions.

    Example:
        >>> nearest_distances(torch.tensor([[0.0], [1.0], [1.0], [4.0]]), k=1)[0].flatten()
        tensor([0.4286, 0.4286,    inf, 1.2857], dtype=torch.float64)
    """
    mask = features.new_ones(len(features), dtype=torch.bool) if mask is None else mask
    rows, _, weight = finite_rows(features, mask, accumulation_dtype(features.device))
    finite = weight > 0
    repeated = _repetitions(rows, finite)
    counts = finite & ~repeated
    distances = rows.new_full((len(rows), k), torch.inf)
    wanted = min(k, len(rows) - 1)
    if not rows.numel() or not wanted:
        return distances, counts, repeated
    rows = _moderate(rows, counts)
    near = nearest_rows(rows, wanted, excluded=~counts)
    own = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    neighbour = counts[near] & counts.unsqueeze(1) & (near != own)
    found = torch.where(neighbour, _distances(rows, rows, near), torch.inf)
    distances[:, :wanted] = found.sort(dim=1).values
    return distances, counts, repeated


def nearest_squares(rows: Tensor, points: Tensor, k: int, first: int = 0) -> Tensor:
    """Squared distances of rows to the ``k`` nearest other points; can be differentiated once, by the rows.

    From the Gram matrix about the mean in double precision (single on devices without), which is right to 1e-4 for
    distances of 1e-6 of the spread; exactly 0 below the rounding, where the gradient is, too. The backward pass is one
    product with a matrix of ``k`` numbers a row. Tiles bound the memory, and nothing waits for the device.

    Args:
        rows: Shape ``(N, D)``: points ``first`` to ``first + N``.
        points: Shape ``(M, D)``; they rest, no gradient reaches them.
        k: How many neighbours, below ``M``.
        first: Where ``rows`` begin among the points.

    Returns:
        Shape ``(N, k)``, ascending, in the precision they were computed in.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [3.0]])
        >>> nearest_squares(points, points, k=2).round()
        tensor([[1., 9.],
                [1., 4.],
                [4., 9.]], dtype=torch.float64)
    """
    squares: Tensor = _NearestSquares.apply(rows, points, k, first)  # type: ignore[no-untyped-call]
    return squares


class _NearestSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, points: Tensor, k: int, first: int) -> Tensor:
        own = torch.arange(first, first + len(rows), device=rows.device)
        wide = points.to(accumulation_dtype(points.device))
        wide = wide - wide.mean(dim=0)
        energy = wide.square().sum(dim=1)
        scores, near, _, _ = _best(wide, energy, k, own, torch.zeros_like(energy, dtype=torch.bool))
        total = energy[own].unsqueeze(1) + energy[near]
        squares = energy[own].unsqueeze(1) - 2 * scores
        squares = torch.where(squares <= 32 * torch.finfo(wide.dtype).eps * total, 0.0, squares)
        ctx.dtype = rows.dtype
        ctx.save_for_backward(wide, own, near, squares)
        return squares

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        wide, own, near, squares = ctx.saved_tensors
        slopes = torch.where(squares == 0, 0.0, 2 * grads[0])
        moved = wide[own] * slopes.sum(dim=1, keepdim=True)
        tile = max(TILE_ELEMENTS // len(wide), 1)
        for start in range(0, len(own), tile):
            part = slice(start, start + tile)
            weights = wide.new_zeros(len(own[part]), len(wide)).scatter_(1, near[part], slopes[part])
            # in place: autocast, which may be on in the backward pass, lets such products be
            moved[part].addmm_(weights, wide, alpha=-1)
        return moved.to(ctx.dtype), None, None, None


def _distances(rows: Tensor, points: Tensor, near: Tensor) -> Tensor:
    """Distances ``(N, k)`` to neighbours by the differences of rows, where nothing cancels, in tiles."""
    tile = max(DIFFERENCE_ELEMENTS // max(near.shape[1] * rows.shape[1], 1), 1)
    pairs = zip(torch.split(rows, tile), torch.split(near, tile), strict=True)
    # `points[there]` would take three times as long
    found = ((own, points.index_select(0, there.flatten()).view(*there.shape, -1)) for own, there in pairs)
    return torch.cat([torch.linalg.vector_norm(other.sub_(own.unsqueeze(1)), dim=2) for own, other in found])


# one operator, into which the compiler need not look, with a way of its own on processors
OPERATOR = "lightning_collapse::nearest_rows"
torch.library.define(OPERATOR, "(Tensor points, int k, int first, int count, Tensor excluded) -> Tensor")


@torch.library.register_fake(OPERATOR)  # type: ignore[untyped-decorator]
def _(points: Tensor, k: int, first: int, count: int, excluded: Tensor) -> Tensor:
    return points.new_empty(count, k, dtype=torch.long)


@torch.library.impl(OPERATOR, "default")
def _(points: Tensor, k: int, first: int, count: int, excluded: Tensor) -> Tensor:
    """In double precision, without a wait for the device."""
    return _search(points, k, torch.arange(first, first + count, device=points.device), excluded)


@torch.library.impl(OPERATOR, "cpu")
def _(points: Tensor, k: int, first: int, count: int, excluded: Tensor) -> Tensor:
    """In single precision, and again what that leaves open; of few points in double precision at once."""
    own = torch.arange(first, first + count)
    if count * len(points) <= SMALL:
        return _search(points, k, own, excluded)
    # whichever row is subtracted: each difference is rounded in proportion to itself
    rows = (points - points.mean(dim=0)).float()
    energy = torch.linalg.vector_norm(rows, dim=1).square()
    near, certain = _candidates(rows, energy, k, own, excluded)
    if not certain.all():
        own = own[~certain]
        candidates, certain = _candidates(rows, energy, k, own, excluded, spare=SPARE)
        near[own - first] = _measured(points, k, own, candidates)
        if not certain.all():
            own = own[~certain]
            near[own - first] = _search(points, k, own, excluded)
    return near


def _candidates(
    rows: Tensor, energy: Tensor, k: int, own: Tensor, excluded: Tensor, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """As many of the nearest as single precision finds, ``(n, k + spare)``; for whom the ``k`` nearest are among them.

    A place that no neighbour fills holds the point itself.
    """
    values, near, rest, itself = _best(rows, energy, min(k + spare, len(rows) - 1), own, excluded)
    n = rows.shape[1] + ROUNDINGS
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
    size, farthest = energy[own].sqrt(), energy[near[:, :k]].amax(dim=1).sqrt()
    least = values[:, k - 1] - gamma * farthest * (size + farthest / 2)
    # what lies farther from the mean than this is, by the triangle inequality, no nearer than the k-th
    reach = (size + (energy[own] - 2 * least).clamp_min(0).sqrt()).minimum(energy.amax().sqrt())
    most = rest + gamma * reach * (size + reach / 2) + n * TINY
    # products of points with themselves, where they were read, show how precise all of them are
    off = (itself - energy[own] / 2).abs()
    single = ~(off.masked_fill(off.isinf(), 0.0) > gamma / 4 * energy[own]).any()
    return torch.where(values.isinf(), own.unsqueeze(1), near), single & (most < least)


def _measured(points: Tensor, k: int, own: Tensor, candidates: Tensor) -> Tensor:
    """The ``k`` nearest of the candidates, by the differences of rows."""
    wide = points.double()
    distances = _distances(wide[own], wide, candidates).masked_fill_(candidates == own.unsqueeze(1), torch.inf)
    return candidates.gather(1, distances.topk(k, largest=False).indices)


def _search(points: Tensor, k: int, own: Tensor, excluded: Tensor) -> Tensor:
    """The ``k`` nearest of the points ``own``, in double precision."""
    rows = points.to(accumulation_dtype(points.device))
    rows = rows - rows.mean(dim=0)
    return _best(rows, rows.square().sum(dim=1), k, own, excluded)[1]


def _best(rows: Tensor, energy: Tensor, k: int, own: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``k`` best scores of the points ``own`` and whose they are, the best of the rest, and those with themselves.

    A score is half the energy of a point less half its squared distance to another one: the larger, the nearer.
    """
    half = (energy / 2).masked_fill(excluded, torch.inf)
    found = []
    for part in torch.split(own, max(TILE_ELEMENTS // len(rows), 1)):
        scores = torch.addmm(half, rows[part], rows.T, beta=-1)
        itself = scores.gather(1, part.unsqueeze(1)).squeeze(1)
        scores.scatter_(1, part.unsqueeze(1), -torch.inf)
        values, near = _largest(scores, k)
        found.append((values, near, scores.scatter_(1, near, -torch.inf).amax(dim=1), itself))
    values, near, rest, itself = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, near, rest, itself


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``topk``, but faster of many columns: the ``k`` largest lie in the ``k`` groups with the largest maxima."""
    columns = scores.shape[1]
    if columns <= FEW:
        return scores.topk(k, dim=1)
    size = min(max(columns // (4 * k), 1), 16)
    groups = columns // size
    index = torch.arange(columns, device=scores.device)
    best = scores[:, : groups * size].view(len(scores), size, groups).amax(dim=1).topk(min(k, groups), dim=1).indices
    members = (best.unsqueeze(2) + index[:size] * groups).flatten(1)
    members = torch.cat([members, index[groups * size :].expand(len(scores), -1)], dim=1)
    values, place = scores.gather(1, members).topk(k, dim=1)
    return values, members.gather(1, place)


def _repetitions(rows: Tensor, finite: Tensor) -> Tensor:
    """Rows that are equal to an earlier one: equal rows have equal keys, and stand together once sorted by them."""
    # frequencies without a common multiple: no two rows that differ in a few numbers share a key by design
    factors = (torch.arange(1, rows.shape[1] + 1, device=rows.device).to(rows.dtype).sqrt() * 12.9898).sin()
    scale = rows.abs().amax() if rows.numel() else rows.new_ones(())
    keys = (rows / torch.where(scale > 0, scale, 1.0)).mul_(factors).sum(dim=1)
    order = torch.where(finite, keys, torch.inf).argsort(stable=True)
    ordered, exists = rows[order], finite[order]
    same = (ordered[1:] == ordered[:-1]).all(dim=1) & exists[1:] & exists[:-1]
    repeated = torch.zeros_like(finite)
    repeated[order[1:]] = same
    return repeated


def _moderate(rows: Tensor, counts: Tensor) -> Tensor:
    """Rows about their mean, at a scale where squares are safe: both leave ratios of distances as they are."""
    top = rows.abs().amax()
    rows = rows / torch.where(top > 0, top, 1.0)
    weight = counts.to(rows.dtype).unsqueeze(1)
    rows.sub_(weight.T @ rows / weight.sum().clamp_min(1)).mul_(weight)
    top = rows.abs().amax()
    return rows.div_(torch.where(top > 0, top, 1.0))
