"""Healthy networks with maps for outputs: a detector's pyramid with an image-wide summary, and a segmentation."""

from functools import partial

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, loader
from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.parts import block
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

SIZE = 16


def scenes(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 16, 16)`` of a bright square and a dim bar on noise, and what each pixel is (0, 1, 2)."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(SIZE - 5, (2, count, 1, 1), generator=generator).unbind()
    bar = torch.randint(SIZE, (count, 1, 1), generator=generator)
    rows, columns = torch.arange(SIZE).view(-1, 1), torch.arange(SIZE).view(1, -1)
    square = (rows >= y) & (rows < y + 5) & (columns >= x) & (columns < x + 5)
    labels = torch.where(square, 1, torch.where((columns == bar) & (rows >= 0), 2, 0))
    images = torch.tensor([0.0, 1.0, 0.5])[labels] + 0.3 * torch.randn(labels.shape, generator=generator)
    return images.unsqueeze(1), labels


class Dense(Learner):
    """A classifier of pixels with a pyramid of three scales.

    Args:
        summary: Whether the mean over the coarsest map is added everywhere, so that this layer says one thing only.
    """

    def __init__(self, summary: bool) -> None:
        super().__init__(rate=3e-3)
        self.down = nn.ModuleList([block(1, 8, 1, "group"), block(8, 16, 2, "group"), block(16, 32, 2, "group")])
        self.lateral = nn.ModuleList([nn.Conv2d(width, 16, 1) for width in (8, 16, 32)])
        self.whole = nn.Conv2d(32, 16, 1) if summary else None
        self.head = nn.Sequential(block(16, 16, 1, "group"), nn.Conv2d(16, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of pixels."""
        maps = [images]
        for layer in self.down:
            maps.append(layer(maps[-1]))
        merged = self.lateral[2](maps[3])
        if self.whole is not None:
            merged = merged + self.whole(maps[3].mean(dim=(2, 3), keepdim=True))
        for level in (1, 0):
            merged = nn.functional.interpolate(merged, scale_factor=2.0) + self.lateral[level](maps[level + 1])
        scores: Tensor = self.head(merged)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of pixels; most of them are background."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def habitat(seed: int, summary: bool) -> Habitat:
    """Scenes; the score is the accuracy on pixels that are no background."""
    images, labels = scenes(seed, 600)
    test, truth = scenes(seed + 100, 100)
    model = Dense(summary)
    there = truth > 0
    return Habitat(
        model,
        [loader(images, labels, size=32, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor()],
        steps=300,
        embedding=model.lateral[2],
        held_out=lambda: float((model(test).argmax(dim=1) == truth)[there].double().mean()),
        every=10,
    )


SPECIMENS = tuple(
    Specimen(name, partial(habitat, summary=summary), says, family="dense prediction")
    for name, summary, says in (
        ("pyramid", True, "a layer that says the same at all places"),
        ("segmentation", False, "most pixels are background"),
    )
)
