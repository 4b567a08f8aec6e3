"""The inputs and the targets of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

TARGET_KEYS = ("targets", "target", "labels", "label", "y")
"""Keys of a mapping that are looked up, in this order."""


def targets_of(batch: Any) -> Tensor | None:
    """Targets where they usually are: the second element of ``(x, y)``, or under one of :data:`TARGET_KEYS`.

    Returns:
        The tensor as it is, or ``None`` where there is none.

    Example:
        >>> import torch
        >>> targets_of((torch.zeros(4, 3), torch.ones(4))), targets_of({"y": torch.ones(2)})
        (tensor([1., 1., 1., 1.]), tensor([1., 1.]))
    """
    if isinstance(batch, Mapping):
        found: Any = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1:
        found = batch[1]
    else:
        found = None
    return found if isinstance(found, Tensor) else None


def call_on(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: on the first of a pair, or on what a mapping holds beside the targets.

    Example:
        >>> import torch
        >>> call_on(nn.Identity(), (torch.ones(2), torch.zeros(2)))
        tensor([1., 1.])
    """
    if isinstance(batch, Mapping):
        target = next((key for key in TARGET_KEYS if key in batch), None)
        return model(**{key: value for key, value in batch.items() if key != target})
    return model(batch[0] if isinstance(batch, Sequence) else batch)


def target_rows(targets: Tensor) -> Tensor:
    """Targets as rows ``(N, n)`` of floating-point numbers: vectors ``(N,)`` are one target each.

    Example:
        >>> import torch
        >>> target_rows(torch.tensor([1, 2])), target_rows(torch.zeros(4, 5, 3)).shape
        (tensor([[1.],
                [2.]]), torch.Size([20, 3]))
    """
    rows = targets.detach()
    rows = rows if rows.is_floating_point() else rows.float()
    return rows.reshape(-1, 1) if rows.ndim < 2 else rows.flatten(0, -2)
