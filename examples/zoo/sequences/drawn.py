"""Batches that a function draws, to train on or held out."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

Draw = Callable[[torch.Generator, int], Any]


class Drawn(IterableDataset[Any]):
    """Batches that a function draws by the step, from 0; the same ones for every run of a seed."""

    def __init__(self, draw: Draw, seed: int) -> None:
        self.draw, self.seed = draw, seed

    def __iter__(self) -> Iterator[Any]:
        generator, step = torch.Generator().manual_seed(self.seed), 0
        while True:
            yield self.draw(generator, step)
            step += 1


def drawn(draw: Draw, seed: int) -> DataLoader[Any]:
    """Batches without end."""
    return DataLoader(Drawn(draw, seed), batch_size=None)


def held_out_of(draw: Draw, seed: int) -> Any:
    """A batch that training does not see."""
    return draw(torch.Generator().manual_seed(1000 + seed), 0)


def held_out_rows(draw: Draw, seed: int) -> list[Tensor]:
    """Parts of eight batches that training does not see, joined."""
    batches = [held_out_of(draw, 10 * seed + i) for i in range(8)]
    return [torch.cat(part) for part in zip(*batches, strict=True)]
