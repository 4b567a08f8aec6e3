"""Drift into complete collapse: BYOL without its predictor."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .material import Learner, digits, loader, mlp, neighbour_accuracy, view
from .specimen import Habitat, Specimen


class BYOL(Learner):
    """An encoder and a projector that are to predict what their slow copy makes of another view."""

    def __init__(self, predictor: bool) -> None:
        super().__init__(rate=5e-3)
        self.online = nn.Sequential(mlp(64, 128, 64, norm=True), mlp(64, 64, 64, norm=True))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = mlp(64, 128, 64, norm=True) if predictor else nn.Identity()

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """One minus the cosine, both ways."""
        first, second = view(batch[0]), view(batch[0])
        return self._loss(first, second) + self._loss(second, first)

    def _loss(self, first: Tensor, second: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.target(second)
        return 1 - nn.functional.cosine_similarity(self.predictor(self.online(first)), target).mean()

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The copy follows."""
        for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
            slow.lerp_(fast, 0.3)


def make(seed: int, predictor: bool) -> Habitat:
    """Digits without labels."""
    data = digits(seed)
    model = BYOL(predictor)
    return Habitat(
        model,
        [loader(data[0], size=128, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor()],
        steps=200,
        embedding=model.online,
        held_out=lambda: neighbour_accuracy(model.online, data),
    )


SPECIMEN = Specimen(
    "BYOL without predictor",
    make,
    "the representation drifts towards one point",
    kind="complete_collapse",
    setting="predictor",
    healthy=True,
    sick=False,
    family="joint embedding",
)
