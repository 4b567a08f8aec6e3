"""Feature buffer: the latest rows of layers, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.sketch import GaussianSketch
from lightning_collapse.utilities.features import evenly


@dataclass
class LayerFeatures:
    """What is known of one layer at a point.

    Attributes:
        rows: Shape ``(n, D)``, of this process.
        mask: Boolean, shape ``(n,)``: rows that are not padding.
        expected: How many rows all processes together hold at most; the same on every process.
        width: Features that the layer has; more than ``D`` where rows are a random projection.
        beside: What belongs to each row, shape ``(n, k)``, such as its targets, if something was given.
        sums: What measures of rows need of the rows of all processes, by their names.
    """

    rows: Tensor
    mask: Tensor
    expected: int
    width: int = 0
    beside: Tensor | None = None
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.width = self.width or self.rows.shape[1]

    @property
    def sketched(self) -> bool:
        """Whether the rows are a random projection."""
        return self.width > self.rows.shape[1]


class Batch(NamedTuple):
    """Rows of one layer in one batch: when it was, the rows, which are not padding, and what belongs to each."""

    time: int
    rows: Tensor
    mask: Tensor
    beside: Tensor | None

    def spread(self, limit: int) -> Batch:
        """At most ``limit`` of the rows, spread over all."""
        if len(self.rows) <= limit:
            return self
        beside = None if self.beside is None else evenly(self.beside, limit)
        return Batch(self.time, evenly(self.rows, limit), evenly(self.mask, limit), beside)


class FeatureBuffer:
    """Keeps the rows of the latest batches, and of each layer no more batches than hold the rows of a point.

    Args:
        max_dim: Rows with more features are projected to this many.
    """

    def __init__(self, max_dim: int) -> None:
        self.max_dim = max_dim
        self._batches: dict[str, list[Batch]] = {}
        self._sketches: dict[int, GaussianSketch] = {}

    def add(self, layer: str, batch: Batch, capacity: int) -> None:
        """Keep a batch, and drop older ones that the newer make up for.

        Args:
            layer: Its name.
            batch: Its rows ``(n, D)`` are no view of anything.
            capacity: How many rows of the layer to keep at least, if there have been as many.
        """
        width = batch.rows.shape[1]
        if width > self.max_dim:
            if width not in self._sketches:
                self._sketches[width] = GaussianSketch(width, self.max_dim, batch.rows.device)
            batch = batch._replace(rows=self._sketches[width](batch.rows))
        kept = self._batches.setdefault(layer, [])
        kept.append(batch)
        while sum(len(newer.rows) for newer in kept[1:]) >= capacity:
            del kept[0]

    def __len__(self) -> int:
        """The most rows that a layer has here."""
        return max((sum(len(batch.rows) for batch in kept) for kept in self._batches.values()), default=0)

    def read(self, layer: str, width: int, capacity: int, since: int, device: torch.device) -> LayerFeatures:
        """The latest rows of a layer, at most ``capacity``; none where there are none.

        Of the oldest batch that is needed to fill up a part is taken, spread over it. Batches from before ``since`` and
        those of another width do not count.
        """
        found: list[Batch] = []
        for batch in reversed(self._batches.get(layer, ())):
            left = capacity - sum(len(newer.rows) for newer in found)
            if left <= 0 or batch.time < since:
                break
            if batch.rows.shape[1] == width:
                found.insert(0, batch.spread(left))
        if not found:
            rows, mask = torch.zeros(0, width, device=device), torch.zeros(0, dtype=torch.bool, device=device)
            return LayerFeatures(rows, mask, capacity)
        beside = [batch.beside for batch in found if batch.beside is not None]
        return LayerFeatures(
            torch.cat([batch.rows for batch in found]) if len(found) > 1 else found[0].rows,
            torch.cat([batch.mask for batch in found]),
            capacity,
            beside=torch.cat(beside) if len(beside) == len(found) else None,
        )

    def clear(self) -> None:
        """Forget the rows."""
        self._batches.clear()

    def state_dict(self) -> dict[str, Any]:
        """The rows, as lists of tensors and numbers."""
        return {
            layer: [[part for part in batch if part is not None] for batch in kept]
            for layer, kept in self._batches.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], layers: Iterable[str], device: torch.device) -> None:
        """Take rows of these layers back."""
        for layer in layers:
            for time, *tensors in state.get(layer, ()):
                rows, mask, *rest = (tensor.to(device) for tensor in tensors)
                batch = Batch(time, rows, mask, rest[0] if rest else None)
                self._batches.setdefault(layer, []).append(batch)
