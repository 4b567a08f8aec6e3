"""Minority collapse: half of the classes have a hundredth of the images."""

import torch
from torch import Tensor, nn

from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, SpectralAlignmentMonitor

from .material import Learner, accuracy, digits, loader, mlp
from .specimen import Habitat, Specimen

FEATURE_DECAY, HEAD_DECAY = 1e-3, 1e-2


class SquaredError(Learner):
    """A classifier with the penalties of the unconstrained feature model (Dang et al. 2023, arXiv 2301.00437)."""

    def __init__(self, images: int) -> None:
        super().__init__(rate=0.05, momentum=0.9)
        self.images = images
        self.body, self.head = mlp(64, 64, 64, 64), nn.Linear(64, 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.body(images).relu())
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error and the squared norms of features and head."""
        images, labels = batch
        features = self.body(images).relu()
        error = (self.head(features) - nn.functional.one_hot(labels, 10)).square().sum(dim=1).mean()
        lengths = self.images * FEATURE_DECAY * features.square().sum(dim=1).mean()
        total: Tensor = 0.5 * (error + lengths + HEAD_DECAY * self.head.weight.square().sum())
        return total


def imbalanced(seed: int, ratio: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits, with a ``ratio``-th of the images of 5 to 9 to train on."""
    images, labels, test, classes = digits(seed)
    rare = (labels >= 5).nonzero().flatten()
    kept = torch.cat([(labels < 5).nonzero().flatten(), rare[: len(rare) // ratio]])
    return images[kept], labels[kept], test, classes


def make(seed: int, ratio: int) -> Habitat:
    """Digits."""
    images, labels, test, classes = imbalanced(seed, ratio)
    model = SquaredError(len(images))
    return Habitat(
        model,
        [loader(images, labels, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor()],
        steps=600,
        every=10,
        embedding=model.body,
        held_out=lambda: accuracy(model, test, classes),
    )


SPECIMEN = Specimen(
    "rare classes",
    make,
    "half of the classes have a hundredth of the images",
    kind="minority_collapse",
    setting="ratio",
    healthy=1,
    sick=100,
    layers=("head*",),
    family="plain classifier",
)
