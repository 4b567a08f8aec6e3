"""Self-predictive representations: a latent model of the world, with or without a stop to the target's gradient."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, mlp, neighbour_accuracy
from examples.zoo.sequences.drawn import drawn
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .gridworld import neighbours

SIZE, BATCH, WIDTH, STEPS = 5, 96, 32, 500


def transitions(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy pictures of a world before and after an action, ``(N, 25)``, and the action."""
    cells = torch.randint(SIZE**2, (BATCH,), generator=generator)
    actions = torch.randint(4, (BATCH,), generator=generator)
    after = neighbours(SIZE)[cells, actions]
    return picture(cells, generator), actions, picture(after, generator)


def picture(cells: Tensor, generator: torch.Generator) -> Tensor:
    """One pixel is the agent."""
    return nn.functional.one_hot(cells, SIZE**2) + 0.15 * torch.randn(len(cells), SIZE**2, generator=generator)


class LatentModel(Learner):
    """An encoder and what it will make of the next picture (Schwarzer et al. 2021, arXiv 2007.05929)."""

    def __init__(self, stops: bool) -> None:
        super().__init__(rate=2e-3)
        self.stops = stops
        self.encoder, self.dynamics = mlp(SIZE**2, 64, WIDTH, norm=True), mlp(WIDTH + 4, 64, WIDTH, norm=True)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """One minus the cosine."""
        before, actions, after = batch
        latent = torch.cat([self.encoder(before), nn.functional.one_hot(actions, 4).float()], dim=1)
        target = self.target(after) if self.stops else self.encoder(after)
        return 1 - nn.functional.cosine_similarity(self.dynamics(latent), target, dim=1).mean()

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The target follows."""
        for slow, fast in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
            slow.lerp_(fast, 0.05)


def make(seed: int, stops: bool) -> Habitat:
    """Where is the agent? As the nearest of 300 pictures says."""
    model = LatentModel(stops)
    generator = torch.Generator().manual_seed(1000 + seed)
    cells, test = (torch.randint(SIZE**2, (size,), generator=generator) for size in (300, 360))
    data = picture(cells, generator), cells, picture(test, generator), test
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    loaders = [drawn(transitions, seed)]
    return Habitat(model, loaders, monitors, STEPS, model.encoder, lambda: neighbour_accuracy(model.encoder, data), 10)


SPECIMENS = (
    Specimen(
        "latent model without stop-gradient",
        make,
        "a latent that never changes is easy to predict",
        kind="complete_collapse",
        setting="stops",
        healthy=True,
        sick=False,
        claims=("dimensional_collapse",),
        layers=("encoder*", "dynamics*"),
        family="agent",
    ),
)
