"""Deep Q-networks in a gridworld: with a target network at a small rate, or without one at a large rate."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.zoo.material import Learner, mlp
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .gridworld import GridWorld, efficiency
from .replay import Replay

SIZE, REFRESH, DISCOUNT, STEPS = 6, 25, 0.9, 800


class QNetwork(Learner):
    """Values of actions in a cell, from an embedding of its number."""

    def __init__(self, slow: bool, rate: float, size: int = SIZE) -> None:
        super().__init__(rate)
        self.slow, self.size = slow, size
        self.body = nn.Sequential(nn.Embedding(size**2, 64), mlp(64, 64, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)
        self.target = copy.deepcopy(nn.Sequential(self.body, self.head)).requires_grad_(False)

    def forward(self, cells: Tensor) -> Tensor:
        """Values ``(N, A)``."""
        values: Tensor = self.head(self.body(cells))
        return values

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Squared error of one step (Mnih et al. 2015)."""
        cells, actions, after, rewards, reached = batch
        with torch.no_grad():
            ahead = (self.target(after) if self.slow else self(after)).amax(dim=1)
        value = self(cells).gather(1, actions[:, None]).squeeze(1)
        return nn.functional.mse_loss(value, rewards + DISCOUNT * ahead * ~reached)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The target follows at times."""
        if self.global_step % REFRESH == 0:
            self.target.load_state_dict(nn.Sequential(self.body, self.head).state_dict())


def dqn(seed: int, model: QNetwork) -> Habitat:
    """Find the corner."""
    world = GridWorld(model.size, 1, torch.Generator())
    return Habitat(
        model,
        [DataLoader(Replay(model, model.size, seed), batch_size=None)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), PlasticityMonitor()],
        steps=STEPS,
        every=20,
        embedding=model.body,
        held_out=lambda: efficiency(world, lambda cells: model(cells).argmax(dim=1)),
    )


def make(seed: int, careful: bool) -> Habitat:
    """Six by six cells."""
    return dqn(seed, QNetwork(slow=careful, rate=1e-3 if careful else 0.1))


SPECIMENS = (
    Specimen(
        "DQN in haste",
        make,
        "no target network and a large rate: values explode and features die",
        kind="complete_collapse",
        setting="careful",
        healthy=True,
        sick=False,
        claims=("dimensional_collapse", "loss_explosion", "plasticity_loss"),
        family="agent",
    ),
)
