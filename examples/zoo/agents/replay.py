"""Replay buffer: transitions of agents that act as their network says."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .gridworld import GridWorld

ACTORS, BATCH, CAPACITY, EXPLORES = 16, 64, 4000, 0.3


class Replay(IterableDataset[tuple[Tensor, ...]]):
    """Plays with the network as it is and yields transitions of the past."""

    def __init__(self, model: nn.Module, size: int, seed: int) -> None:
        self.model, self.size, self.seed = model, size, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        world = GridWorld(self.size, ACTORS, generator)
        parts: tuple[Tensor, ...] | None = None
        while True:
            cells = world.cells
            with torch.no_grad():
                actions = self.model(cells).argmax(dim=1)
            random = torch.rand(ACTORS, generator=generator) < EXPLORES
            actions = torch.where(random, torch.randint(4, (ACTORS,), generator=generator), actions)
            new = cells, actions, *world.step(actions)
            parts = (
                new if parts is None else tuple(torch.cat(pair)[-CAPACITY:] for pair in zip(parts, new, strict=True))
            )
            rows = torch.randint(len(parts[0]), (BATCH,), generator=generator)
            yield tuple(part[rows] for part in parts)
