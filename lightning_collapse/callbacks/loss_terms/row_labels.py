"""Labels of a batch, one for each row of features that a layer returned."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_collapse.losses.base import TakesLabels
from lightning_collapse.losses.support.labels import require_labels
from lightning_collapse.utilities.targets import shifted_labels, targets_of


def row_labels(
    read: Callable[[Any], Any] | None, batch: Any, view: Tensor, kind: TakesLabels, chunk: int, module: nn.Module
) -> Tensor:
    """Find the labels of rows, and check what can be checked without a wait for the device.

    Args:
        read: From a batch to its labels. ``None`` looks where :func:`targets_of` does, and moves those of a causal
            language model to the places that predict them, as :func:`shifted_labels` does.
        batch: What ``training_step`` was called with.
        view: The rows, ``(N, D)``, of the first view.
        kind: What the labels must be.
        chunk: 2 if the layer returned both views in one call: labels of both, twice the same, may be there.
        module: The model.

    Returns:
        Shape ``(N,)``, on the device of the rows. Labels ``(B, L)`` of tokens are flattened as the tokens are.

    Raises:
        ValueError: If there are none, not one for each row, or if they are of another type.
    """
    labels = targets_of(batch) if read is None else read(batch)
    if not isinstance(labels, Tensor):
        found = "the batch has none where they are looked for" if read is None else f"`labels` returned {labels!r:.50}"
        raise ValueError(f"{found}. Pass `labels=lambda batch: ...`, a tensor with one for each row")
    if read is None:
        labels = shifted_labels(batch, labels, module)
    flat = labels.detach().to(view.device).flatten()
    if chunk > 1 and len(flat) == chunk * len(view):
        flat = flat[: len(view)]
    if len(flat) != len(view):
        one_hot = kind == "classes" and labels.ndim == 2 and len(labels) == len(view)
        remedy = "a function such as `lambda batch: batch[1].argmax(dim=1)`" if one_hot else "a function of the batch"
        raise ValueError(
            f"`labels` of `Regularizer` must have shape ({len(view)},), one per row, got {tuple(labels.shape)}. Pass"
            f" `labels=`, {remedy}"
        )
    require_labels("Regularizer", flat, len(view), kind)
    return flat
