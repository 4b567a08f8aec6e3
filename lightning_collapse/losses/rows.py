"""What losses over single rows share: labels that name a class, and means over the rows of all processes."""

import torch
from torch import Tensor

from lightning_collapse.losses.base import TooFewRowsError
from lightning_collapse.utilities.distributed import all_reduce_sum, all_reduce_sum_with_grad


def named_rows(function: str, features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Check labels, and tell the rows whose label names a class.

    Args:
        function: What to call the caller in messages.
        features: Features or logits, checked already, shape ``(N, D)``.
        labels: Class of each row, shape ``(N,)``, any integer dtype.
        num_classes: Number of classes ``C``.

    Returns:
        Labels in ``0 .. C - 1``, ``(N,)``, and which of them were so before, boolean ``(N,)``: others, such as -100,
        name no class, and their rows do not count.

    Raises:
        ValueError: If the labels are not integers of shape ``(N,)``.
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"`labels` of `{function}` must have shape ({len(features)},), one per row, got {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` of `{function}` must be integers, got {labels.dtype}. Mixed or soft targets name no class."
        )
    labels = labels.long()
    named = (labels >= 0) & (labels < num_classes)
    return torch.where(named, labels, 0), named


def count_classes(labels: Tensor, named: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Rows of each class over all processes, ``(C,)``, without gradient, in the dtype of ``like``.

    Collective: every process must call it; one all-reduce of ``C`` numbers.
    """
    return all_reduce_sum(like.new_zeros(num_classes).index_add_(0, labels, named.to(like.dtype)))


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
    if len(values) == 0 and int(message[0].detach()) == 0:
        raise TooFewRowsError(
            f"`{function}` needs at least 1 row over all processes, got 0 (0 here). Use a larger batch."
        )
    return message[2:], message[1].detach().clamp_min(1)
