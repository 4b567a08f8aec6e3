"""Dimensional collapse of one tower: a contrastive pair of networks (CLIP) of which one takes steps far too long."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import loader, mlp
from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.transformer import Transformer
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .parts import Learner, block, digit_images


class Towers(Learner):
    """A convolutional network for the upper half of an image, a transformer for columns of the lower half.

    Args:
        factor: Of the learning rate of the transformer.
    """

    def __init__(self, factor: float) -> None:
        super().__init__(rate=2e-3)
        self.factor = factor
        self.upper = nn.Sequential(block(1, 16), block(16, 32, 2), nn.Flatten(), mlp(256, 64, 32))
        self.lower = nn.Sequential(Transformer((4, 1), 8, 32, 2), nn.Linear(32, 32))
        self.scale = nn.Parameter(torch.tensor(2.3))

    def configure_optimizers(self) -> Any:
        """Two groups."""
        slow = [*self.upper.parameters(), self.scale]
        fast = {"params": self.lower.parameters(), "lr": self.rate * self.factor}
        return torch.optim.AdamW([{"params": slow, "lr": self.rate}, fast], weight_decay=0.01)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves, of unit length."""
        upper, lower = self.upper(images[:, :, :4]), self.lower(images[:, :, 4:])
        return nn.functional.normalize(upper, dim=1), nn.functional.normalize(lower, dim=1)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Which lower half belongs to which upper half, and the other way round?"""
        upper, lower = self.embed(batch[0])
        logits, right = self.scale.exp() * upper @ lower.T, torch.arange(len(upper))
        return (nn.functional.cross_entropy(logits, right) + nn.functional.cross_entropy(logits.T, right)) / 2


def found(model: Towers, images: Tensor) -> float:
    """How often the right lower half of a held-out image is among the three nearest of sixty."""
    hits = []
    for some in torch.split(images, 60):
        upper, lower = model.embed(some)
        nearest = (upper @ lower.T).topk(3, dim=1).indices
        hits.append((nearest == torch.arange(len(some)).unsqueeze(1)).any(dim=1).double().mean())
    return float(torch.stack(hits).mean())


def make(seed: int, factor: float) -> Habitat:
    """Halves of digits."""
    images, _, test, _ = digit_images(seed)
    model = Towers(factor)
    return Habitat(
        model,
        [loader(images, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor()],
        steps=400,
        embedding=model.lower,
        held_out=lambda: found(model, test),
        every=10,
    )


SPECIMEN = Specimen(
    "one tower too fast",
    make,
    "one tower of two reads all images along few directions, and the other follows",
    kind="dimensional_collapse",
    setting="factor",
    healthy=1.0,
    sick=50.0,
    layers=("lower*", "upper", "upper.3*"),
    family="two towers",
    claims=("partial_collapse", "attention_entropy_collapse"),
)
