"""Dimensional collapse: contrastive learning at a temperature at which no negative is pushed away in particular."""

import torch
from torch import Tensor, nn

from examples.zoo.material import loader
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .parts import Learner, block, patches, projector, recall, two_views


class Contrastive(Learner):
    """A strided encoder, a projector and InfoNCE between two views."""

    def __init__(self, temperature: float) -> None:
        super().__init__(rate=3e-3)
        self.temperature = temperature
        blocks = [block(3, 16, 2), block(16, 32, 2), block(32, 64, 2)]
        self.encoder = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projector = projector(64, 64, 32)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Which of the others is the other view of the same patch?"""
        first, second = (nn.functional.normalize(self.projector(self.encoder(v)), dim=1) for v in two_views(batch[0]))
        return nn.functional.cross_entropy(first @ second.T / self.temperature, torch.arange(len(first)))


def make(seed: int, temperature: float) -> Habitat:
    """Patches of photographs without labels."""
    train, test = patches(seed)
    model = Contrastive(temperature)
    embed = nn.Sequential(model.encoder, model.projector)
    return Habitat(
        model,
        [loader(train, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor()],
        steps=400,
        embedding=model.projector,
        held_out=lambda: recall(embed, test),
        every=10,
    )


SPECIMEN = Specimen(
    "temperature far too high",
    make,
    "all negatives weigh alike, so two directions are enough",
    kind="dimensional_collapse",
    setting="temperature",
    healthy=0.1,
    sick=10.0,
    layers=("encoder*", "projector*"),
    family="joint embedding",
    claims=("partial_collapse",),
)
