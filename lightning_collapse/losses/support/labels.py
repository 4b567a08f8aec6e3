"""Class labels as losses take them: which rows they name a class of, and how many of each there are."""

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.distributed import all_reduce_sum


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


def require_fixed(classifier: nn.Module, use: str) -> None:
    """Refuse a classifier without a fixed ``weight``, and say which one to ``use``.

    Raises:
        ValueError: If there is no such matrix, or it is learned.
    """
    weight = getattr(classifier, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.requires_grad:
        raise ValueError(
            f"`classifier` must have a fixed `weight` of shape (C, D), got {type(classifier).__name__}. Use `{use}`."
        )


def count_classes(labels: Tensor, named: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Rows of each class over all processes, ``(C,)``, without gradient, in the dtype of ``like``.

    Collective: every process must call it; one all-reduce of ``C`` numbers.
    """
    return all_reduce_sum(like.new_zeros(num_classes).index_add_(0, labels, named.to(like.dtype)))
