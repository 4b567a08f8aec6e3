"""Mixture of experts: without a loss of balance the router sends all rows to a few experts."""

from functools import partial

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, explained
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .drawn import drawn, held_out_rows
from .patches import CLUSTERS, INPUTS, patches

EXPERTS = 8


class Mixture(Learner):
    """A router that sends every row to one of eight experts (Fedus et al. 2021, arXiv 2101.03961)."""

    def __init__(self, balance: float) -> None:
        super().__init__(rate=2e-2)
        self.balance = balance
        self.router = nn.Linear(INPUTS, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(INPUTS, 4) for _ in range(EXPERTS))

    def forward(self, rows: Tensor) -> Tensor:
        """Predictions."""
        return self.mix(rows, self.router(rows).softmax(dim=1))

    def mix(self, rows: Tensor, gates: Tensor) -> Tensor:
        """Of every row the output of its expert, times its gate."""
        weight, chosen = gates.max(dim=1)
        output = torch.zeros(len(rows), 4)
        for i, expert in enumerate(self.experts):
            if (own := chosen == i).any():
                output[own] = weight[own, None] * expert(rows[own])
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error and the loss of balance."""
        rows, targets = batch
        gates = self.router(rows).softmax(dim=1)
        share = nn.functional.one_hot(gates.argmax(dim=1), EXPERTS).float().mean(dim=0)
        error = nn.functional.mse_loss(self.mix(rows, gates), targets)
        total: Tensor = error + self.balance * EXPERTS * (share * gates.mean(dim=0)).sum()
        return total


def mixture(seed: int, balance: float, clusters: int = CLUSTERS) -> Habitat:
    """Each cluster has a linear map of its own."""
    model, draw = Mixture(balance), partial(patches, clusters)
    rows, targets = held_out_rows(draw, seed)
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    return Habitat(model, [drawn(draw, seed)], monitors, 800, model.router, lambda: explained(model, rows, targets), 10)


SPECIMENS = (
    Specimen(
        "router without balance",
        mixture,
        "the router sends all rows to a few experts",
        kind="prototype_collapse",
        setting="balance",
        healthy=1.0,
        sick=0.0,
        claims=("router_collapse", "partial_collapse", "dimensional_collapse"),
        layers=("router*", "experts*"),
        family="mixture of experts",
    ),
)
