"""Gridworlds, many at once, whose agents begin anywhere and look for one cell."""

from collections.abc import Callable

import torch
from torch import Tensor

Policy = Callable[[Tensor], Tensor]
MOVES = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])


class GridWorld:
    """Cells are whole numbers; a reward of 1 at the goal, after which the agent begins elsewhere.

    Args:
        size: Cells along an edge.
        worlds: How many run at once.
        generator: Where agents begin.
        limit: Steps after which an agent is set elsewhere.
    """

    def __init__(self, size: int, worlds: int, generator: torch.Generator, limit: int = 30) -> None:
        self.size, self.generator, self.limit = size, generator, limit
        self.goal = size * size - 1
        self.cells, self.age = self._anywhere(worlds), torch.zeros(worlds, dtype=torch.long)

    def _anywhere(self, count: int) -> Tensor:
        return torch.randint(self.size**2, (count,), generator=self.generator)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells after the actions (before a new beginning), rewards, and whether the goal was reached."""
        cells = neighbours(self.size)[self.cells, actions]
        reached = cells == self.goal
        self.age += 1
        over = reached | (self.age >= self.limit)
        self.cells = torch.where(over, self._anywhere(len(cells)), cells)
        self.age[over] = 0
        return cells, reached.float(), reached

    def shortest(self) -> Tensor:
        """Steps from every cell to the goal."""
        cells = torch.arange(self.size**2)
        rows, columns = cells // self.size, cells % self.size
        return (rows - self.goal // self.size).abs() + (columns - self.goal % self.size).abs()


def neighbours(size: int) -> Tensor:
    """Where each of four actions leads from every cell, ``(S, 4)``; walls hold."""
    cells = torch.arange(size**2)
    places = torch.stack([cells // size, cells % size], dim=1)
    after = (places[:, None] + MOVES).clamp(0, size - 1)
    return after[..., 0] * size + after[..., 1]


def efficiency(world: GridWorld, policy: Policy) -> float:
    """Mean over cells of the shortest way over the one that a policy takes; 0 where it does not arrive."""
    table, shortest = neighbours(world.size), world.shortest()
    cells = torch.arange(world.size**2)
    steps = torch.full_like(cells, 10**6)
    for taken in range(1, 3 * world.size):
        cells = table[cells, policy(cells)]
        steps = torch.where((cells == world.goal) & (steps == 10**6), taken, steps)
    elsewhere = shortest > 0
    return float((shortest / steps)[elsewhere].clamp_max(1).mean())
