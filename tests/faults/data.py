"""Random data: loaders of every habit."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.faults.models import CLASSES, WIDTH

SIZE = 12
LOADERS = ("whole", "short last", "shuffled", "generator", "stream", "empty epochs", "batches of one")


class Rows(Dataset[Any]):
    """Inputs of unequal variance with labels, as pairs or as mappings."""

    def __init__(self, rows: int, mapping: bool) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.x = torch.randn(rows, WIDTH, generator=generator) * torch.linspace(0.2, 2, WIDTH)
        self.y = torch.arange(rows) % CLASSES
        self.mapping = mapping

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i], "y": self.y[i]} if self.mapping else (self.x[i], self.y[i])


class Stream(IterableDataset[Any]):
    """The rows in order; every second epoch is empty if ``gaps``."""

    def __init__(self, rows: Rows, gaps: bool) -> None:
        self.rows, self.gaps, self.epochs = rows, gaps, 0

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        return iter(()) if self.gaps and self.epochs % 2 == 0 else map(self.rows.__getitem__, range(len(self.rows)))


def loader(habit: str, batches: int, mapping: bool) -> DataLoader[Any]:
    """About so many training batches."""
    rows = Rows(batches * SIZE - (5 if habit == "short last" else 0), mapping)
    if habit in ("stream", "empty epochs"):
        return DataLoader(Stream(rows, habit == "empty epochs"), batch_size=SIZE)
    if habit == "batches of one":  # of rows, that is: batch normalization refuses them
        return DataLoader(Rows(batches, mapping), batch_size=1)
    generator = torch.Generator().manual_seed(7) if habit == "generator" else None
    return DataLoader(rows, batch_size=SIZE, shuffle=habit in ("shuffled", "generator"), generator=generator)
