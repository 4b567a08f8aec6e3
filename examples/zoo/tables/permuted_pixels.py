"""Plasticity loss: the order of pixels changes again and again, with or without shrinking and perturbing weights."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Classifier, accuracy, digits, loader
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

PERIOD, STEPS, WIDTH = 60, 945, 64


class Permuted(Classifier):
    """Every 60 steps the pixels come in another order."""

    def __init__(self, refreshes: bool, seed: int) -> None:
        body = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        super().__init__(body, nn.Linear(WIDTH, 10), rate=2e-2)
        self.refreshes, self.seed = refreshes, seed

    def shuffle(self, images: Tensor) -> Tensor:
        """The order of now."""
        generator = torch.Generator().manual_seed(100 * self.seed + self.global_step // PERIOD)
        return images[:, torch.randperm(64, generator=generator)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return super().training_step((self.shuffle(batch[0]), batch[1]), batch_idx)

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shrink and perturb (Ash & Adams 2020, arXiv 1910.08475)."""
        if self.refreshes and self.global_step % PERIOD == 0:
            for parameter in self.parameters():
                parameter.mul_(0.2).add_(0.05 * torch.randn_like(parameter))


def make(seed: int, refreshes: bool) -> Habitat:
    """Digits, in the order of now."""
    images, labels, test, classes = digits(seed)
    model = Permuted(refreshes, seed)
    return Habitat(
        model,
        [loader(images, labels, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()],
        steps=STEPS,
        every=15,
        embedding=model.body,
        held_out=lambda: accuracy(model, model.shuffle(test), classes),
    )


SPECIMENS = (
    Specimen(
        "permuted pixels",
        make,
        "units saturate, and every new order of pixels is learned worse",
        kind="plasticity_loss",
        setting="refreshes",
        healthy=True,
        sick=False,
        claims=("dimensional_collapse", "complete_collapse"),
        layers=("body*",),
        family="continual",
    ),
)
