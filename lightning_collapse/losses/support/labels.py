"""Labels as losses take them: which rows they name a class of, how many of each there are, and those of others."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_collapse.losses.base import TakesLabels
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size
from lightning_collapse.utilities.private_torch import is_fake, is_inside_transform

_FIRST_STEP: ContextVar[bool] = ContextVar("first step", default=False)


class UnknownClassError(ValueError):
    """A label is beyond the number of classes."""


@contextmanager
def all_labels_read() -> Iterator[None]:
    """Let losses read labels wherever they lie, which waits for the device: for the first step of a training."""
    token = _FIRST_STEP.set(True)
    try:
        yield
    finally:
        _FIRST_STEP.reset(token)


def require_labels(owner: str, labels: Tensor, rows: int, kind: TakesLabels) -> None:
    """Check labels of rows.

    Args:
        owner: What to call the owner of the argument in messages.
        labels: What is to be labels.
        rows: How many rows there are.
        kind: What they are to be: of classes integers, of targets numbers that are ordered.

    Raises:
        ValueError: If they have another shape or type.
    """
    if labels.shape != (rows,):
        raise ValueError(f"`labels` of `{owner}` must have shape ({rows},), one per row, got {tuple(labels.shape)}.")
    if labels.is_complex() or labels.dtype == torch.bool or (labels.is_floating_point() and kind != "targets"):
        wanted = "real numbers" if kind == "targets" else "integers"
        told = "Mixed or soft targets name no class." * (kind != "targets")
        raise ValueError(f"`labels` of `{owner}` must be {wanted}, got {labels.dtype}. {told}".rstrip())


def named_rows(
    function: str, features: Tensor, labels: Tensor, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Check labels, and tell the rows whose label names a class.

    Args:
        function: What to call the caller in messages.
        features: Features or logits, checked already, shape ``(N, D)``.
        labels: Class of each row, shape ``(N,)``, any integer dtype.
        num_classes: Number of classes ``C``; any if ``None``.

    Returns:
        Labels in ``0 .. C - 1``, ``(N,)``, and which of them were so before, boolean ``(N,)``: others, such as -100,
        name no class, and their rows do not count.

    Raises:
        ValueError: If the labels are not integers of shape ``(N,)``, or one is ``C`` or more. The latter is looked at
            where nothing waits for it, in the memory of a single process, or within :func:`all_labels_read`;
            elsewhere such rows do not count.
    """
    require_labels(function, labels, len(features), "classes")
    labels = labels.detach().long()
    if num_classes is not None:
        _require_below(num_classes, function, labels)
    named = labels >= 0 if num_classes is None else (labels >= 0) & (labels < num_classes)
    return torch.where(named, labels, 0), named


def _require_below(num_classes: int, function: str, labels: Tensor) -> None:
    if torch.compiler.is_compiling() or is_inside_transform() or is_fake(labels) or not len(labels):
        return
    if not _FIRST_STEP.get() and (labels.device.type != "cpu" or world_size() > 1):
        return
    largest = int(labels.cpu().numpy().max())  # of a device in the first step of a training only
    if largest >= num_classes:
        raise UnknownClassError(
            f"`labels` of `{function}` must be below {num_classes}, the number of classes, got {largest}. A row that"
            f" is not to count has a negative one: `torch.where(labels == {largest}, -100, labels)`."
        )


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


def gather_classes(labels: Tensor, named: Tensor, first: int, total: int) -> Tensor:
    """Labels of the rows of all processes, ``(M,)``, and -1 where one names no class.

    Collective: every process must call it; one all-reduce of ``M`` numbers.

    Args:
        labels: Of the rows of this process, ``(N,)``.
        named: Which of them name a class, boolean ``(N,)``.
        first: Where the rows of this process begin among all.
        total: How many rows all processes have, ``M``.
    """
    labels = labels.masked_fill(~named, -1)
    if world_size() == 1:
        return labels
    return all_reduce_sum(pad(labels, (first, total - first - len(labels))))
