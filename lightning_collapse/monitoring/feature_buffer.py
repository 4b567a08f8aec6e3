"""Rows of layers between two points, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.spectral.sketch import GaussianSketch
from lightning_collapse.utilities.features import evenly


class FeatureBuffer:
    """Keeps rows of layers until they are read, too wide ones as their random projection.

    Args:
        max_dim: Rows with more features are projected to this many.
    """

    def __init__(self, max_dim: int) -> None:
        self.max_dim = max_dim
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._sketches: dict[int, GaussianSketch] = {}

    def __len__(self) -> int:
        """The most rows that a layer has here."""
        return max((sum(len(rows) for rows, _ in kept) for kept in self._rows.values()), default=0)

    def add(self, layer: str, rows: Tensor, mask: Tensor, rows_per_batch: int) -> None:
        """Keep at most ``rows_per_batch`` of these rows ``(n, D)``, spread, and their mask; if fewer, themselves."""
        if len(rows) > rows_per_batch:
            rows, mask = evenly(rows, rows_per_batch), evenly(mask, rows_per_batch)
        width = rows.shape[1]
        if width > self.max_dim:
            if width not in self._sketches:
                self._sketches[width] = GaussianSketch(width, self.max_dim, rows.device)
            rows = self._sketches[width](rows)
        self._rows.setdefault(layer, []).append((rows, mask))

    def read(self, layer: str, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """All rows of a layer that have this width, ``(n, width)``, and their mask ``(n,)``; none if there are none."""
        kept = [(rows, mask) for rows, mask in self._rows.get(layer, ()) if rows.shape[1] == width]
        if not kept:
            return torch.zeros(0, width, device=device), torch.zeros(0, dtype=torch.bool, device=device)
        return torch.cat([rows for rows, _ in kept]), torch.cat([mask for _, mask in kept])

    def clear(self) -> None:
        """Forget the rows."""
        self._rows.clear()

    def state_dict(self) -> dict[str, Any]:
        """The rows, as lists of tensors."""
        return {layer: [list(pair) for pair in kept] for layer, kept in self._rows.items()}

    def load_state_dict(self, state: dict[str, Any], layers: Iterable[str], device: torch.device) -> None:
        """Take rows of these layers back."""
        for layer in layers:
            kept = [(rows.to(device), mask.to(device)) for rows, mask in state.get(layer, ())]
            if kept:
                self._rows[layer] = kept
