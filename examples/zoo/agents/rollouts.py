"""Rollouts: a few steps of many agents that act by a policy."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .gridworld import GridWorld

SIZE, WORLDS, HORIZON, DISCOUNT, STEPS = 5, 24, 8, 0.9, 600


class Rollouts(IterableDataset[tuple[Tensor, ...]]):
    """Plays some steps with the policy as it is."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        world = GridWorld(SIZE, WORLDS, generator)
        while True:
            played = []
            for _ in range(HORIZON):
                cells = world.cells
                with torch.no_grad():
                    chances = self.model(cells)[0].softmax(dim=1).nan_to_num(0.25)
                actions = torch.multinomial(chances, 1, generator=generator).squeeze(1)
                played.append((cells, actions, *world.step(actions)))
            yield tuple(torch.stack(part) for part in zip(*played, strict=True))
