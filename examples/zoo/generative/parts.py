"""Convolutional encoders and decoders of 8 x 8 images, and outcomes that the specimens of this folder share."""

from collections.abc import Callable

from lightning.pytorch import Callback
from torch import Tensor, nn

from examples.zoo.material import Learner, loader
from examples.zoo.specimen import Habitat
from examples.zoo.vision.parts import block, digit_images
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor


def encoder(outputs: int, norm: str = "group") -> nn.Sequential:
    """From ``(N, 1, 8, 8)`` to ``(N, outputs)``."""
    return nn.Sequential(block(1, 16, 1, norm), block(16, 32, 2, norm), nn.Flatten(), nn.Linear(512, outputs))


def decoder(inputs: int, norm: str = "group") -> nn.Sequential:
    """From ``(N, inputs)`` to ``(N, 1, 8, 8)``."""
    unfold = nn.Sequential(nn.Linear(inputs, 512), nn.Unflatten(1, (32, 4, 4)), nn.ReLU())
    up = nn.Sequential(nn.Upsample(scale_factor=2), block(32, 16, 1, norm))
    return nn.Sequential(unfold, up, nn.Conv2d(16, 1, 3, padding=1))


def explained(reconstruct: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Share of the pixels' variance over images that reconstructions explain."""
    error = (reconstruct(images) - images).square().mean()
    return float(1 - error / images.var(dim=0, correction=0).mean())


def generative(
    model: Learner,
    seed: int,
    embedding: nn.Module,
    held_out: Callable[[Tensor], float],
    outcome: Callable[[Tensor], float] | None = None,
    size: int = 64,
    every: int = 10,
    monitors: tuple[Callback, ...] = (),
) -> Habitat:
    """Digits without labels; both scores are of held-out images."""
    images, _, test, _ = digit_images(seed)
    return Habitat(
        model,
        [loader(images, size=size, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), *monitors],
        steps=400,
        embedding=embedding,
        held_out=lambda: held_out(test),
        every=every,
        outcome=None if outcome is None else lambda _: outcome(test),
    )
