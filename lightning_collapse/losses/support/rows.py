"""Feature rows as losses take them: enough of them, of unit length, and their mean over all processes."""

import torch
from torch import Tensor

from lightning_collapse.losses.base import TooFewRowsError
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad


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


def unit_rows(features: Tensor) -> Tensor:
    """Rows divided by their length; a row of zeros stays one, with zero gradient, where dividing has none.

    Args:
        features: Shape ``(..., D)``, at least ``float32``.
    """
    # the largest entry first: squares of small numbers would underflow
    largest = torch.linalg.vector_norm(features.detach(), torch.inf, dim=-1, keepdim=True)
    empty = largest == 0  # and not what is no number, which must not look like a row of zeros
    scaled = features / largest.masked_fill(empty, 1.0)
    squares = scaled.square().sum(dim=-1, keepdim=True)
    # times a reciprocal: the derivative of a quotient takes three more passes over the rows
    units: Tensor = scaled * squares.masked_fill(empty, torch.inf).rsqrt()
    return units


def lengths(rows: Tensor) -> Tensor:
    """Lengths of rows, from ``(..., D)`` to ``(...)``; of zeros first and second derivatives are 0."""
    squares = rows.square().sum(dim=-1)
    empty = squares == 0  # and not what is no number
    return torch.where(empty, 0.0, torch.where(empty, 1.0, squares).sqrt())


def mean_of_rows(function: str, values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over the rows of all processes; in data-parallel training gradients are those of a single process.

    Collective: every process must call it; one all-reduce of ``T + 2`` numbers, see :func:`sum_of_rows`.

    Args:
        function: What to call the caller in messages.
        values: Shape ``(N, T)``; ``N`` may differ between processes.
        counted: Which rows count, boolean ``(N,)``; all by default.

    Returns:
        Shape ``(T,)``; 0 if there are rows and none counts.

    Raises:
        TooFewRowsError: If there is no row at all.
    """
    total, count = sum_of_rows(function, values, counted)
    return total / count


def sum_of_rows(function: str, values: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over the rows of all processes, and how many count; arguments as in :func:`mean_of_rows`.

    Collective: every process must call it; one all-reduce of ``T + 2`` numbers. Only a process without rows waits for
    their number, to raise where, and only where, all others raise too.

    Returns:
        Shape ``(T,)`` and, 0-dimensional and at least 1, the number of rows that count.

    Raises:
        TooFewRowsError: If there is no row at all.
    """
    n = values.new_full((), len(values))
    count = n if counted is None else counted.sum().to(values.dtype)
    if counted is not None:
        values = torch.where(counted.unsqueeze(1), values, 0.0)
    message = all_reduce_sum_with_grad(torch.cat([torch.stack([n, count]), values.sum(dim=0)]))
    require_rows(function, 1, message[0].detach(), len(values))
    return message[2:], message[1].detach().clamp_min(1)
