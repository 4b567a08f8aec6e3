"""Healthy agents that look dangerous: values that are all alike, and learning with few states."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, mlp
from examples.zoo.sequences.drawn import drawn
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .dqn import QNetwork, dqn

LENGTH, BATCH, DISCOUNT = 20, 64, 0.95


class ChainValues(Learner):
    """Values of going left and right on a chain: both rise together from zero, along one direction."""

    def __init__(self) -> None:
        super().__init__(rate=1e-3)
        self.body, self.head = nn.Sequential(mlp(1, 64, 64), nn.ReLU()), nn.Linear(64, 2)
        self.target = [torch.zeros(LENGTH, 2)]

    def forward(self, cells: Tensor) -> Tensor:
        """Values ``(N, 2)`` of cells, whole numbers."""
        values: Tensor = self.head(self.body(cells[:, None] / LENGTH))
        return values

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error; every cell pays 1 but the last, and the walk never ends."""
        cells, actions = batch
        after = (cells + 2 * actions - 1).clamp(0, LENGTH - 1)
        aim = (after < LENGTH - 1).float() * (1 - DISCOUNT) + DISCOUNT * self.target[0][after].amax(dim=1)
        return nn.functional.mse_loss(self(cells).gather(1, actions[:, None]).squeeze(1), aim)

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The target follows at times."""
        if self.global_step % 20 == 0:
            self.target = [self(torch.arange(LENGTH))]


def values_together(seed: int) -> Habitat:
    """The score is how near values are to what they should be: 1 all along the chain."""

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        return torch.randint(LENGTH, (BATCH,), generator=generator), torch.randint(2, (BATCH,), generator=generator)

    model = ChainValues()
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), PlasticityMonitor()]

    def score() -> float:
        return 1 - float((model(torch.arange(LENGTH - 2)).amax(dim=1) - 1).abs().mean())

    return Habitat(model, [drawn(draw, seed)], monitors, 1200, model.body, score, every=20)


def small_world(seed: int) -> Habitat:
    """Nine cells for 64 features: no more than nine different rows in a batch."""
    return dqn(seed, QNetwork(slow=True, rate=1e-3, size=3))


SPECIMENS = (
    Specimen("values that rise together", values_together, "two values are nearly the same number", family="agent"),
    Specimen("nine states", small_world, "features of nine different rows", family="agent"),
)
