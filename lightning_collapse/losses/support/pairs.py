"""Pairwise distances, and the rows of the global batch they are taken of."""

import torch
from torch import Tensor

from lightning_collapse.losses.base import TooFewRowsError
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_gather_rows_with_grad


def gather_rows(function: str, rows: Tensor, least: int = 2) -> tuple[Tensor, int]:
    """All rows of all processes, and the index of the first one of this process.

    Collective: every process must call it, see :func:`all_gather_rows_with_grad`.

    Args:
        function: What to call the caller in messages.
        rows: Shape ``(..., N, D)``; ``N`` may differ between processes.
        least: How many rows the caller needs.

    Raises:
        TooFewRowsError: If there are fewer than ``least`` rows over all processes.
    """
    everything, first = all_gather_rows_with_grad(rows)
    count, here = everything.shape[-2], rows.shape[-2]
    if count < least:
        raise TooFewRowsError(
            f"`{function}` needs at least {least} row{'s' * (least > 1)} over all processes, got {count} ({here} here)."
            " Use a larger batch, or `drop_last=True` in the DataLoader."
        )
    return everything, first


def squared_distances(rows: Tensor, everything: Tensor, first: int) -> Tensor:
    """Squared distances of ``rows`` to ``everything``, infinite to itself; exactly 0 below the rounding.

    From the Gram matrix about the mean in ``float64`` (``float32`` on devices without), which is right to 1e-4 for
    distances of 1e-6 of the spread and many times faster than the differences of all pairs.

    Args:
        rows: Shape ``(N, D)``: rows ``first`` to ``first + N`` of ``everything``.
        everything: Shape ``(M, D)``.
        first: Where ``rows`` begin in it.

    Returns:
        Shape ``(N, M)``, in the precision it was computed in.
    """
    dtype = accumulation_dtype(rows.device)
    center = everything.detach().to(dtype).mean(dim=0)
    rows, everything = rows.to(dtype) - center, everything.to(dtype) - center
    energy = rows.square().sum(dim=1, keepdim=True) + everything.square().sum(dim=1)
    squares = energy - 2 * rows @ everything.T
    squares = torch.where(squares <= 32 * torch.finfo(dtype).eps * energy, 0.0, squares)
    own = torch.arange(first, first + len(rows), device=rows.device).unsqueeze(1)
    return squares.masked_fill(own == torch.arange(len(everything), device=rows.device), torch.inf)
