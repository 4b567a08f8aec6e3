"""Dimensional collapse: contrastive learning whose augmentation leaves nothing of an image but its brightness."""

import torch
from torch import Tensor, nn

from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .material import Learner, digits, loader, mlp, neighbour_accuracy, view
from .specimen import Habitat, Specimen

TEMPERATURE = 0.2


class Contrastive(Learner):
    """An encoder, a projector and InfoNCE."""

    def __init__(self, shuffles: bool) -> None:
        super().__init__(rate=5e-3)
        self.shuffles = shuffles
        self.encoder, self.projector = mlp(64, 128, 64), mlp(64, 128, 64)

    def augment(self, images: Tensor) -> Tensor:
        """Another view, whose pixels may be shuffled."""
        images = view(images)
        return images.gather(1, torch.rand_like(images).argsort(dim=1)) if self.shuffles else images

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Which of the others is the other view of the same image?"""
        first, second = (self.projector(self.encoder(self.augment(batch[0]))) for _ in range(2))
        cosines = nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).T
        return nn.functional.cross_entropy(cosines / TEMPERATURE, torch.arange(len(first)))


def make(seed: int, shuffles: bool) -> Habitat:
    """Digits without labels."""
    data = digits(seed)
    model = Contrastive(shuffles)
    return Habitat(
        model,
        [loader(data[0], size=128, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor()],
        steps=300,
        embedding=model.projector,
        held_out=lambda: neighbour_accuracy(model.encoder, data),
    )


SPECIMEN = Specimen(
    "strong augmentation",
    make,
    "views share nothing but the brightness of the image",
    kind="dimensional_collapse",
    setting="shuffles",
    healthy=False,
    sick=True,
    layers=("encoder*", "projector*"),
    family="joint embedding",
    claims=("partial_collapse",),
)
