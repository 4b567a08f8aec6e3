"""Rows as losses take them: of unit length, enough of them, and of all processes."""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_collapse.losses.base import TooFewRowsError
from lightning_collapse.utilities.distributed import all_gather_rows, world_size


def unit_rows(features: Tensor) -> Tensor:
    """Rows divided by their length; a row of zeros stays one, with zero gradient, where dividing has none.

    Args:
        features: Shape ``(..., D)``, at least ``float32``.
    """
    # the largest entry first: squares of small numbers would underflow
    largest = features.detach().abs().amax(dim=-1, keepdim=True)
    there = largest > 0
    scaled = features / torch.where(there, largest, torch.ones_like(largest))
    length = torch.where(there, scaled, torch.ones_like(scaled)).norm(dim=-1, keepdim=True)
    return torch.where(there, scaled / length, torch.zeros_like(scaled))


def require_rows(function: str, needed: int, count: int | Tensor, here: int) -> None:
    """Raise where, and only where, all other processes raise too, from the count of rows over all of them.

    Waits for the device only on a process that by itself has too few rows.

    Raises:
        TooFewRowsError: If there are fewer than ``needed`` rows over all processes.
    """
    if here < needed and int(count) < needed:
        raise TooFewRowsError(
            f"`{function}` needs at least {needed} row{'s' * (needed > 1)} over all processes, got {int(count)}"
            f" ({here} here). Use a larger batch, or `drop_last=True` in the DataLoader."
        )


def shared_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all processes, for a loss that every process evaluates on all of them.

    The gradient of such a loss is the same on every process, so none has to travel: it arrives at the rows of this
    process, times the number of processes, by which data-parallel training divides.

    Collective: every process must call it; see :func:`~lightning_collapse.utilities.distributed.all_gather_rows`.

    Args:
        rows: Shape ``(n, D)``; ``n`` may differ between processes.

    Returns:
        Rows ``(R * n_max, D)``, zero where there is none, and the boolean mask ``(R * n_max,)`` of those that are.
    """
    ranks = world_size()
    gathered, mask = all_gather_rows(rows)
    if ranks == 1:
        return rows, mask
    start = dist.get_rank() * (len(gathered) // ranks)
    own = rows + (ranks - 1) * (rows - rows.detach())
    return torch.cat([gathered[:start], own, gathered[start + len(rows) :]]), mask
