"""Cloned units: units that do what another one does."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows


@full_precision
def cloned_fraction(features: Tensor, mask: Tensor | None = None, threshold: float = 0.95) -> Tensor:
    r"""Share of the units of a layer that do what another one does, up to scale and offset.

    .. math:: \#\{i : \max_{j \ne i} |\operatorname{corr}(h_i, h_j)| > 0.95\} / n

    Gradient descent keeps clones equal, so they are lost to learning. The threshold is that of the source, whose code
    takes the cosine without the mean and counts all but the last of a group; then units that are never negative, and
    vary little, count as one (a layer of fresh sigmoids reads 1).

    Args:
        features: Shape ``(N, n)``. Rows with NaN or infinity are left out.
        mask: Boolean, shape ``(N,)``: rows to count.
        threshold: Of the absolute correlation.

    Returns:
        0-dimensional, 0 (independent units, if rows are many: below twenty, chance makes clones) to 1 (every unit has
        a clone). Units that are constant are no clones: they are dead. NaN for fewer than three rows.

    Raises:
        ValueError: If ``threshold`` is not between 0 and 1.

    References:
        Joudaki et al., *Barriers for Learning in an Evolving World*, 2025. https://arxiv.org/abs/2510.00304

    Example:
        >>> h = torch.tensor([1.0, -2.0, 3.0, 0.0, 1.0])
        >>> cloned_fraction(torch.stack([h, 1 - 2 * h, h.square(), torch.zeros(5)], dim=1))
        tensor(0.5000)
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"`threshold` must be at least 0 and below 1, got {threshold}.")
    if not len(features):
        return features.new_full((), torch.nan)
    rows, _, weight = finite_rows(features, mask, accumulation_dtype(features.device))
    count = weight.sum()
    rows = (rows - weight @ rows / count) * weight.unsqueeze(1)
    rows = rows / rows.abs().amax(dim=0).clamp_min(torch.finfo(rows.dtype).tiny)  # squares neither overflow nor vanish
    unit = rows / torch.linalg.vector_norm(rows, dim=0).clamp_min(torch.finfo(rows.dtype).tiny)
    unit = unit.to(features.dtype)  # nothing cancels from here on
    likeness = (unit.T @ unit).abs_().fill_diagonal_(0.0)
    cloned = (likeness.amax(dim=0) > threshold).to(features.dtype).mean()
    return torch.where(count > 2, cloned, torch.nan)
