"""Collectives: sums and rows over processes, with and without gradient."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def world_size(group: "ProcessGroup | None" = None) -> int:
    """Number of processes in ``group`` (default: all); 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def process_rank(group: "ProcessGroup | None" = None) -> int:
    """Number of this process in ``group`` (default: all); 0 without a process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor, group: "ProcessGroup | None" = None) -> Tensor:
    """Sum over processes, without gradient; the argument keeps its own value.

    Collective: every process must call it, with the same shape and dtype.

    Args:
        tensor: Any shape; pack several statistics into one tensor, each call is one message.
        group: Processes to sum over; all by default.

    Returns:
        A new tensor, the same on every process.
    """
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def all_reduce_max(tensor: Tensor, group: "ProcessGroup | None" = None) -> Tensor:
    """Elementwise maximum over processes, without gradient; the argument keeps its own value.

    Collective: every process must call it, with the same shape and dtype.
    """
    largest = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world_size(group) > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def all_reduce_sum_with_grad(tensor: Tensor, group: "ProcessGroup | None" = None) -> Tensor:
    r"""Sum over processes that passes gradients to all of them; the argument itself if there is one process.

    Collective, in the forward and, where a gradient is asked for, in the backward pass: every process must call it,
    with the same shape and dtype, and every process must run backward or none.

    If each of :math:`R` processes evaluates the same loss :math:`f(\sum_r s_r)`, the gradient of the sum of these
    losses with respect to :math:`s_r` is :math:`R\,f'`; the mean over processes that data-parallel training takes
    turns it into the gradient of :math:`f` on the concatenated batch. A plain all-reduce would give :math:`1/R` of it.

    Args:
        tensor: Any shape; pack several statistics into one tensor, each call is one message.
        group: Processes to sum over; all by default.

    Returns:
        The sum, the same on every process.
    """
    if world_size(group) == 1:
        return tensor
    total: Tensor = _AllReduceSum.apply(tensor, group)  # type: ignore[no-untyped-call]
    return total


def max_over_processes(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The largest that any process brings of each number, on the host: shapes, for a plan that all must share.

    Collective: every process must call it, with equally many numbers. Waits for the device if there are several
    processes, so it is not for every step.

    Example:
        >>> max_over_processes([3, 0], torch.device("cpu"))
        [3, 0]
    """
    if world_size() == 1:
        return list(numbers)
    agreed: list[float] = all_reduce_max(torch.tensor(numbers, dtype=_exact(device), device=device)).tolist()
    return agreed


def from_first_process(value: T) -> T:
    """What the first process brings, on every process; anything that pickles, so not for every step.

    Collective: every process must call it.

    Example:
        >>> from_first_process(["encoder"])
        ['encoder']
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all_processes(value: T) -> list[T]:
    """What every process brings, in their order; anything that pickles, so not for every step.

    Collective: every process must call it.

    Example:
        >>> from_all_processes("encoder")
        ['encoder']
    """
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def to_first_process(value: T) -> list[T]:
    """What every process brings, in their order, on the first process alone; on the others none.

    Collective: every process must call it.

    Example:
        >>> to_first_process("encoder")
        ['encoder']
    """
    if world_size() == 1:
        return [value]
    found: list[Any] | None = [None] * world_size() if process_rank() == 0 else None
    dist.gather_object(value, found)
    return found or []


def all_gather_rows(
    rows: Tensor, mask: Tensor | None = None, group: "ProcessGroup | None" = None
) -> tuple[Tensor, Tensor]:
    """Rows of every process on every process, without gradient; each may have a different number of them.

    Collective: every process must call it, with the same number of columns and the same dtype. Two messages, and one
    wait for the device to learn the longest length, which the shape of the result is made of: for bounded reservoirs
    at a logging point, and for losses that no sum over rows can express.

    Args:
        rows: Shape ``(n, D)``; ``n`` may differ between processes and may be 0.
        mask: Boolean, shape ``(n,)``: which rows are valid; all by default.
        group: Processes to gather from; all by default.

    Returns:
        Rows of shape ``(R * n_max, D)`` in the order of the processes, zero where there is none, and the boolean mask
        ``(R * n_max,)`` of valid ones. Without a process group ``rows`` and their mask.

    Raises:
        ValueError: If ``rows`` is not a matrix.
    """
    if rows.ndim != 2:
        raise ValueError(f"`rows` must have shape (n, D), got {tuple(rows.shape)}. Flatten all but the last dimension.")
    rows = rows.detach()
    mask = rows.new_ones(len(rows), dtype=torch.bool) if mask is None else mask
    ranks = world_size(group)
    if ranks == 1:
        return rows, mask
    length = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(length, op=dist.ReduceOp.MAX, group=group)
    # the mask travels as a last column, so that rows and mask are one message
    padded = rows.new_zeros(int(length), rows.shape[1] + 1)
    padded[: len(rows), :-1] = rows
    padded[: len(rows), -1] = mask.to(rows.dtype)
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(gathered, padded, group=group)
    everything = torch.cat(gathered)
    return everything[:, :-1], everything[:, -1] > 0


def all_gather_rows_with_grad(rows: Tensor, group: "ProcessGroup | None" = None) -> tuple[Tensor, int]:
    """Rows of every process on every process, in their order; gradients reach the process whose rows they are.

    Collective, in the forward and, where a gradient is asked for, in the backward pass: every process must call it,
    with shapes that differ in the number of rows only. Two messages, and one wait for the device to learn the numbers
    of rows, which the shape of the result is made of, so that no exact way goes without: for losses that no sum over
    rows can express. Gradients are those of :func:`all_reduce_sum_with_grad`.

    Args:
        rows: Shape ``(..., n, D)``; ``n`` may differ between processes and may be 0.
        group: Processes to gather from; all by default.

    Returns:
        All rows, ``(..., sum of n, D)``, and the index of the first one of this process. Without a process group
        ``rows`` itself and 0.
    """
    ranks = world_size(group)
    if ranks == 1:
        return rows, 0
    rank = dist.get_rank(group)
    counts = torch.zeros(ranks, dtype=torch.long, device=rows.device)
    counts[rank] = rows.shape[-2]
    numbers: list[int] = all_reduce_sum(counts, group).tolist()  # waits for the device
    first = sum(numbers[:rank])
    # a sum in which every row has one term
    return all_reduce_sum_with_grad(pad(rows, (0, 0, first, sum(numbers[rank + 1 :]))), group), first


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: "ProcessGroup | None") -> Tensor:
        ctx.group = group
        return all_reduce_sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # through `apply`, so that the gradient can itself be differentiated
        return all_reduce_sum_with_grad(grads[0], ctx.group), None
