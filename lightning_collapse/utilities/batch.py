"""Batch size: what a batch tells about it, without asking the device."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def batch_size(batch: Any) -> int:
    """First dimension of the first tensor in a batch; 1 if there is none.

    Example:
        >>> import torch
        >>> batch_size({"x": [torch.zeros(8, 3)], "y": torch.zeros(8)})
        8
    """
    return next((tensor.shape[0] for tensor in _tensors(batch)), 1)


def batch_positions(batch: Any) -> int:
    """A floor for the rows that a model multiplies by its weights: tokens where the batch holds integers.

    Example:
        >>> import torch
        >>> batch_positions(torch.zeros(8, 16, dtype=torch.long)), batch_positions(torch.zeros(8, 16))
        (128, 8)
    """
    return next((t.shape[0] if t.is_floating_point() else t.numel() for t in _tensors(batch)), 1)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from _tensors(value)
