"""Complete collapse: metric learning from the hardest negatives, which wrong labels make impossible to push away."""

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
        super().__init__(rate=3e-3)
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
    """Digits with labels, of which three in ten were drawn at random: the hardest negatives are often of the class."""
    data, model = digit_images(seed), Triplets(hardest)
    generator = torch.Generator().manual_seed(seed)
    wrong, drawn = (
        torch.rand(len(data[1]), generator=generator) < 0.3,
        torch.randint(10, data[1].shape, generator=generator),
    )
    labels = torch.where(wrong, drawn, data[1])
    return Habitat(
        model,
        [loader(data[0], labels, size=64, seed=seed)],
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
    "negatives that look like the positives pull all images onto one point",
    kind="complete_collapse",
    setting="hardest",
    healthy=False,
    sick=True,
    family="metric learning",
    claims=("dimensional_collapse",),
)
