"""Complete collapse: metric learning from the hardest negatives, whose least loss at first is one point for all."""

import torch
from torch import Tensor, nn

from examples.zoo.material import loader, neighbour_accuracy
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .parts import Learner, conv_net, digit_images

MARGIN = 1.0


class Triplets(Learner):
    """An embedding in which an image is nearer to those of its class than to others by a margin.

    Args:
        hardest: Takes the nearest other image as the negative, instead of one that is farther than the positive.
    """

    def __init__(self, hardest: bool) -> None:
        super().__init__(rate=1e-2, momentum=0.9)
        self.hardest = hardest
        self.encoder = conv_net(norm="none", outputs=32)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """By how much the margin is missed."""
        embedded = self.encoder(batch[0])
        distance = (embedded.unsqueeze(1) - embedded).square().sum(dim=2).add(1e-12).sqrt()
        same = batch[1].unsqueeze(1) == batch[1]
        chosen = torch.rand_like(distance).masked_fill(~same, -1.0).argmax(dim=1, keepdim=True)
        positive = distance.gather(1, chosen)
        far = same if self.hardest else same | (distance <= positive)
        negative = distance.masked_fill(far, torch.inf).amin(dim=1, keepdim=True)
        missed: Tensor = (positive - negative + MARGIN).clamp_min(0)  # none where no other image is farther
        return missed.mean()


def apart(encoder: nn.Module, images: Tensor, labels: Tensor) -> float:
    """How often the nearest image of another class is farther than the nearest of the same by half the margin."""
    embedded = encoder(images)
    distance = torch.cdist(embedded, embedded).fill_diagonal_(torch.inf)
    same = labels.unsqueeze(1) == labels
    own, other = (distance.masked_fill(away, torch.inf).amin(dim=1) for away in (~same, same))
    return float((other > own + MARGIN / 2).double().mean())


def make(seed: int, hardest: bool) -> Habitat:
    """Digits with labels."""
    data, model = digit_images(seed), Triplets(hardest)
    return Habitat(
        model,
        [loader(*data[:2], size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor()],
        steps=400,
        embedding=model.encoder,
        held_out=lambda: neighbour_accuracy(model.encoder, data),
        every=10,
        outcome=lambda _: apart(model.encoder, *data[2:]),
    )


SPECIMEN = Specimen(
    "hardest negatives",
    make,
    "one point for all images is where the hardest triplets pull first",
    kind="complete_collapse",
    setting="hardest",
    healthy=False,
    sick=True,
    family="metric learning",
    claims=("dimensional_collapse",),
)
