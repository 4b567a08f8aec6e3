"""Recurrent overflow: a recurrent network whose gradients are clipped up to the middle of its run only."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, explained
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, RegressionCollapseMonitor, SpectralAlignmentMonitor

from .drawn import drawn, held_out_rows

LENGTH, SIZE, WIDTH, ONSET = 24, 32, 32, 250


def sums(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
    """Numbers and marks ``(N, L, 2)``, and the sum of those that are marked, ``(N, 1)``."""
    numbers = torch.rand(SIZE, LENGTH, generator=generator)
    marks = (torch.rand(SIZE, LENGTH, generator=generator) < 0.2).float()
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(dim=1, keepdim=True)


class Adder(Learner):
    """A leaky recurrent network that begins as the identity (Le et al. 2015, arXiv 1504.00941)."""

    def __init__(self, explodes: bool) -> None:
        super().__init__(rate=0.01, momentum=0.9)
        self.explodes = explodes
        self.read, self.recur, self.head = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 1)
        nn.init.eye_(self.recur.weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Predictions ``(N, 1)``."""
        inputs = self.read(rows)
        state = torch.zeros_like(inputs[:, 0])
        for step in range(LENGTH):
            state = nn.functional.leaky_relu(self.recur(state) + inputs[:, step], 0.1)
        sums: Tensor = self.head(state)
        return sums

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        rows, targets = batch
        return nn.functional.mse_loss(self(rows), targets)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """To a norm of 1, up to a step."""
        if not self.explodes or self.global_step < ONSET:
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)


def adder(seed: int, explodes: bool) -> Habitat:
    """Sums of marked numbers."""
    model = Adder(explodes)
    rows, targets = held_out_rows(sums, seed)
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), RegressionCollapseMonitor()]

    def score() -> float:
        share = explained(model, rows, targets)
        return share if share > -1 else -1.0  # NaN too

    return Habitat(model, [drawn(sums, seed)], monitors, 500, model.recur, score, every=10)


SPECIMENS = (
    Specimen(
        "recurrent overflow",
        adder,
        "gradients are no longer clipped, and a state overflows",
        kind="non_finite",
        setting="explodes",
        healthy=False,
        sick=True,
        claims=("loss_explosion",),
        family="recurrent",
        onset=ONSET,
    ),
)
