"""Mode collapse of a GAN: a discriminator that is stronger than a penalty on its gradient would let it be."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.parts import block, digit_images

from .parts import Learner, decoder, generative

NOISE = 16


class GAN(Learner):
    """A generator and a discriminator of digits, trained at once (non-saturating loss).

    Args:
        penalty: Weight of the squared gradient at real images (R1, arXiv:1801.04406).
    """

    def __init__(self, penalty: float) -> None:
        super().__init__(rate=2e-3)
        self.penalty = penalty
        self.generator = nn.Sequential(decoder(NOISE, norm="batch"), nn.Sigmoid())
        blocks = [block(1, 16, 1, "none"), block(16, 32, 2, "none")]
        self.discriminator = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(512, 1))

    def configure_optimizers(self) -> Any:
        """The usual momentum, with which two players are hard to balance."""
        return torch.optim.AdamW(self.parameters(), lr=self.rate, betas=(0.9, 0.99), weight_decay=0.0)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Both players' losses; each sees its own parameters only."""
        real = batch[0].clone().requires_grad_()
        fake = self.generator(torch.randn(len(real), NOISE))
        scores = self.discriminator(real)
        slope = torch.autograd.grad(scores.sum(), real, create_graph=True)[0].square().flatten(1).sum(dim=1).mean()
        softplus = nn.functional.softplus
        judge = softplus(-scores).mean() + softplus(self.discriminator(fake.detach())).mean()
        self.discriminator.requires_grad_(False)
        forge = softplus(-self.discriminator(fake)).mean()
        self.discriminator.requires_grad_(True)
        return judge + self.penalty / 2 * slope + forge


def covered(generator: nn.Module, seed: int) -> float:
    """Share of the ten digits (as a perplexity) among generated images, times the share that look like any digit.

    All real images have another one nearer than 2.
    """
    images, labels, _, _ = digit_images(seed)
    noise = torch.randn(400, NOISE, generator=torch.Generator().manual_seed(0))
    distance, nearest = torch.cdist(generator(noise).flatten(1), images.flatten(1)).min(dim=1)
    like = distance < 2.5
    share = labels[nearest[like]].bincount(minlength=10) / like.sum().clamp_min(1)
    return float(torch.special.entr(share).sum().exp() / 10 * like.double().mean())


def make(seed: int, penalty: float) -> Habitat:
    """Digits without labels."""
    model = GAN(penalty)
    return generative(model, seed, model.discriminator[2], lambda _: covered(model.generator, seed), size=32)


SPECIMEN = Specimen(
    "GAN without gradient penalty",
    make,
    "the generator makes few digits, over and over",
    kind="partial_collapse",
    setting="penalty",
    healthy=1.0,
    sick=0.0,
    layers=("generator*", "discriminator*"),
    family="generative adversarial",
    claims=("dimensional_collapse",),
)
