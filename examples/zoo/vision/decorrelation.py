"""Dimensional collapse: VICReg and Barlow Twins that hardly ask features to differ from each other."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse.losses import BarlowTwins, VICReg

from .parts import Learner, conv_net, digit_images, projector, recall, self_supervised, two_views


class Decorrelated(Learner):
    """An encoder, a projector, and a loss of two views."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], norm: str) -> None:
        super().__init__(rate=2e-3)
        self.loss = loss
        self.encoder = conv_net(norm=norm)
        self.projector = projector(64, 128, 64)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Views agree, features do not."""
        first, second = (self.projector(self.encoder(view)) for view in two_views(batch[0]))
        return self.loss(first, second)


def make(seed: int, weight: float, loss: Callable[[float], Callable[[Tensor, Tensor], Tensor]], norm: str) -> Habitat:
    """Digits without labels."""
    data, model = digit_images(seed), Decorrelated(loss(weight), norm)
    embed = nn.Sequential(model.encoder, model.projector)
    return self_supervised(model, seed, model.projector, lambda _: recall(embed, data[2]))


def vicreg(weight: float) -> VICReg:
    """By its weight of the covariance."""
    return VICReg(covariance=weight)


def barlow(weight: float) -> BarlowTwins:
    """By its weight of what is off the diagonal."""
    return BarlowTwins(redundancy=weight)


SPECIMENS = tuple(
    Specimen(
        name,
        partial(make, loss=loss, norm=norm),
        "features repeat each other",
        kind="dimensional_collapse",
        setting="weight",
        healthy=healthy,
        sick=sick,
        layers=("encoder*", "projector*"),
        family="joint embedding",
        claims=("partial_collapse",),
    )
    for name, loss, norm, healthy, sick in (
        ("convolutional VICReg without covariance", vicreg, "group", 1.0, 1e-4),
        ("Barlow Twins without decorrelation", barlow, "batch", 5e-3, 1e-7),
    )
)
