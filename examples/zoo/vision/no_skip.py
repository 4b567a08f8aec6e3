"""Complete collapse with depth: a residual network without its skip connections, from a small initialization."""

from torch import Tensor, nn

from examples.zoo.material import Classifier, accuracy, loader
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .parts import block, digit_images

DEPTH = 8


class Residual(nn.Module):
    """Two convolutions, with or without what came in.

    Args:
        channels: Of the maps.
        skips: Whether the block adds to what came in.
    """

    def __init__(self, channels: int, skips: bool) -> None:
        super().__init__()
        self.skips = skips
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of the same shape."""
        change: Tensor = self.second(self.first(maps).relu())
        return (maps + change).relu() if self.skips else change.relu()


def make(seed: int, skips: bool) -> Habitat:
    """Digits with labels."""
    images, labels, test, classes = digit_images(seed)
    blocks = (Residual(16, skips) for _ in range(DEPTH))
    body = nn.Sequential(block(1, 16, 2, norm="none"), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model = Classifier(body, nn.Linear(64, 10), rate=1e-3)
    return Habitat(
        model,
        [loader(images, labels, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()],
        steps=400,
        embedding=model.body,
        held_out=lambda: accuracy(model, test, classes),
        every=10,
    )


SPECIMEN = Specimen(
    "residual network without skips",
    make,
    "with every block all images look more alike",
    kind="complete_collapse",
    setting="skips",
    healthy=True,
    sick=False,
    layers=("body*", "head*"),
    develops=False,
    family="convolutional classifier",
    claims=("dimensional_collapse", "plasticity_loss"),
)
