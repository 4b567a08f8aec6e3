"""Batch labels: the integers of a batch that say which class each row of features is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.monitoring.feature_hooks import Captured
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.targets import shifted_labels, targets_of

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class BatchLabels:
    """Finds the labels of batches, and warns of those that have none.

    Args:
        function: From a batch to its labels; ``None`` for where they usually are, moved to the outputs that predict
            them where the model is a causal language model.
        model: The model; it is not asked if there is a function.
        warn: What to do with a warning.

    Example:
        >>> BatchLabels(None, nn.Linear(1, 1), print)((torch.zeros(2, 3), torch.tensor([0, 1])))
        tensor([0, 1])
    """

    def __init__(
        self, function: Callable[[Any], Tensor] | None, model: nn.Module, warn: Callable[[str], None], name: str = ""
    ) -> None:
        self._function, self._model, self._warn = function, model, warn
        self._name = f" {name!r}" if name else ""

    def __call__(self, batch: Any) -> Tensor | None:
        """Integer labels of any shape, or ``None``."""
        try:
            labels = self._usual(batch) if self._function is None else self._function(batch)
        except Exception as error:  # of the user's function: what is only watched goes on
            self._warn(f"`labels`{self._name} failed: {type(error).__name__}: {error}")
            return None
        if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
            self._warn(
                f"the batch has no integer labels{self._name}; batches like it are left out. Pass `labels=`, a"
                " function from the batch to its labels, such as `labels=lambda batch: batch['class']`."
            )
            return None
        return labels

    def matching(self, captured: Captured, labels: Tensor) -> Tensor | None:
        """The label of every row that was captured; -100 for padding, ``None`` where their numbers do not fit."""
        if captured.returned != labels.numel():
            self.warn_unpaired(captured.returned, labels.numel())
            return None
        labels = evenly(labels.flatten().to(captured.rows.device).long(), len(captured.rows))
        return torch.where(captured.mask, labels, -100)

    def warn_unpaired(self, rows: int, labels: int) -> None:
        """Say that there is no label for every row."""
        self._warn(
            f"the classifier received {rows} rows and the batch has {labels} labels; such batches are left out. Say"
            " which labels belong to its rows with `labels=`."
        )

    def _usual(self, batch: Any) -> Tensor | None:
        labels = targets_of(batch)
        return shifted_labels(batch, labels, self._model) if isinstance(labels, Tensor) else None
