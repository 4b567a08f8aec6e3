"""Recurrent overflow: a recurrent ReLU network whose steps grow from the middle of its run on."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, explained
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, RegressionCollapseMonitor, SpectralAlignmentMonitor

from .material import drawn, held_out_of

LENGTH, SIZE, WIDTH, ONSET = 24, 32, 32, 250


def sums(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
    """Numbers and marks ``(N, L, 2)``, and the sum of those that are marked, ``(N, 1)``."""
    numbers = torch.rand(SIZE, LENGTH, generator=generator)
    marks = (torch.rand(SIZE, LENGTH, generator=generator) < 0.2).float()
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(dim=1, keepdim=True)


def grows(step: int) -> float:
    """Constant, then ever faster."""
    return float(1.05 ** max(step - ONSET, 0))


class Adder(Learner):
    """A recurrent ReLU network that begins as the identity (Le et al. 2015, arXiv 1504.00941)."""

    def __init__(self, explodes: bool) -> None:
        super().__init__(rate=0.01, momentum=0.0, schedule=grows if explodes else None)
        self.rnn, self.head = nn.RNN(2, WIDTH, nonlinearity="relu", batch_first=True), nn.Linear(WIDTH, 1)
        nn.init.eye_(self.rnn.get_parameter("weight_hh_l0"))

    def forward(self, rows: Tensor) -> Tensor:
        """Predictions ``(N, 1)``."""
        sums: Tensor = self.head(self.rnn(rows)[0][:, -1])
        return sums

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        rows, targets = batch
        return nn.functional.mse_loss(self(rows), targets)


def adder(seed: int, explodes: bool) -> Habitat:
    """Sums of marked numbers."""
    model = Adder(explodes)
    batches = [held_out_of(sums, 10 * seed + i) for i in range(8)]
    rows, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    return Habitat(
        model,
        [drawn(sums, seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), RegressionCollapseMonitor()],
        steps=500,
        every=10,
        embedding=model.rnn,
        held_out=lambda: explained(model, rows, targets),
    )


SPECIMENS = (
    Specimen(
        "recurrent overflow",
        adder,
        "steps grow until a state overflows",
        kind="non_finite",
        setting="explodes",
        healthy=False,
        sick=True,
        claims=("loss_explosion",),
        family="recurrent",
        onset=ONSET,
    ),
)
