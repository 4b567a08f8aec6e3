"""A healthy recurrent network whose input has one direction."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, explained, warm_up
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .drawn import drawn, held_out_of


class Forecaster(Learner):
    """A GRU on one number at a time: the input has one direction, and states have few."""

    def __init__(self) -> None:
        super().__init__(rate=5e-3, schedule=warm_up(20))
        self.gru, self.head = nn.GRU(1, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """The next number, ``(N, 1)``."""
        output: Tensor = self.head(self.gru(rows)[0][:, -1])
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        return nn.functional.mse_loss(self(batch[0]), batch[1])


def one_number(seed: int) -> Habitat:
    """Waves of any frequency."""

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        phase, speed = (torch.rand(32, 1, generator=generator) for _ in range(2))
        wave = (6.28 * phase + (0.1 + 0.5 * speed) * torch.arange(21)).sin()
        return wave[:, :20, None], wave[:, 20:]

    model, (rows, targets) = Forecaster(), held_out_of(draw, seed)
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    return Habitat(model, [drawn(draw, seed)], monitors, 400, model.gru, lambda: explained(model, rows, targets), 10)


SPECIMENS = (Specimen("one number at a time", one_number, "states of few directions", family="recurrent"),)
