"""Row masks: rows that count and rows that do not, without asking the device."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype


def finite_rows(
    features: Tensor, mask: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Set rows that must not count to zero and say which they are.

    Args:
        features: Shape ``(..., N, D)``.
        mask: Boolean, shape ``(..., N)``: rows to consider; all if ``None``.
        dtype: Of what is returned; that of the features if ``None``.

    Returns:
        The features with the other rows zero, ``(..., N, D)``; how many rows were considered, ``(...)``; one for each
        considered row without NaN or infinity and zero for the others, ``(..., N)``, in the same dtype.
    """
    considered = torch.ones_like(features[..., 0], dtype=torch.bool) if mask is None else mask
    rows = features if dtype is None else features.to(dtype)
    # a sum is finite if and only if its terms are, and costs a quarter of asking each of them
    counts = considered & rows.sum(dim=-1, dtype=accumulation_dtype(rows.device)).isfinite()
    lost = ~counts.unsqueeze(-1)
    rows = rows.masked_fill(lost, 0.0) if rows is features else rows.masked_fill_(lost, 0.0)  # which costs a third
    return rows, considered.sum(dim=-1), counts.to(rows.dtype)
