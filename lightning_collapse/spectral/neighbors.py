"""Distances to the nearest rows, exact, in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows

TILE_ELEMENTS = 1 << 22
"""Most numbers of a tile of distances, or of the rows it compares: it bounds the memory."""
DIFFERENCES = 2
"""How many of the nearest are measured again by the difference of rows."""


@torch.no_grad()
@full_precision
def nearest_distances(features: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Euclidean distances of every row to its ``k`` nearest others; a row that repeats an earlier one does not count.

    From the Gram matrix of a tile of centered rows, in double precision (``float32`` on devices without): right to
    1e-4 for distances of 1e-6 of the features' spread. The two nearest are measured again by the difference of rows,
    where nothing cancels. Nothing here waits for the device. Work ``O(N ** 2 * D)``.

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
    rows, _, weight = finite_rows(features.to(accumulation_dtype(features.device)), mask)
    finite = weight > 0
    repeated = _repetitions(rows, finite)
    counts = finite & ~repeated
    distances = rows.new_full((len(rows), k), torch.inf)
    if not rows.numel():
        return distances, counts, repeated
    rows = _moderate(rows, counts)
    energy = rows.square().sum(dim=1)
    wanted = min(k, len(rows))
    tile = max(TILE_ELEMENTS // max(len(rows), DIFFERENCES * rows.shape[1]), 1)
    index = torch.arange(len(rows), device=rows.device)
    for start in range(0, len(rows), tile):
        own = index[start : start + tile]
        squares = energy[own].unsqueeze(1) + energy - 2 * rows[own] @ rows.T
        excluded = ~counts | (index == own.unsqueeze(1))
        squares = squares.masked_fill(excluded, torch.inf)
        candidates = squares.topk(wanted, largest=False)
        near = candidates.indices[:, :DIFFERENCES]
        exact = torch.linalg.vector_norm(rows[near] - rows[own].unsqueeze(1), dim=2)
        found = torch.cat([exact, candidates.values[:, DIFFERENCES:].clamp_min(0).sqrt()], dim=1)
        found = torch.where(candidates.values.isinf() | ~counts[own].unsqueeze(1), torch.inf, found)
        distances[own, :wanted] = found.sort(dim=1).values
    return distances, counts, repeated


def _repetitions(rows: Tensor, finite: Tensor) -> Tensor:
    """Rows that are equal to an earlier one: equal rows have equal keys, and stand together once sorted by them."""
    # frequencies without a common multiple: no two rows that differ in a few numbers share a key by design
    factors = (torch.arange(1, rows.shape[1] + 1, device=rows.device).to(rows.dtype).sqrt() * 12.9898).sin()
    scale = rows.abs().amax() if rows.numel() else rows.new_ones(())
    keys = (rows / torch.where(scale > 0, scale, 1.0) * factors).sum(dim=1)
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
    rows = (rows - (rows * weight).sum(dim=0) / weight.sum().clamp_min(1)) * weight
    top = rows.abs().amax()
    return rows / torch.where(top > 0, top, 1.0)
