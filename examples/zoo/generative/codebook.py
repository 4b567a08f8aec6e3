"""Codebook collapse: a VQ-VAE whose codes are pulled by gradients only, against moving averages and restarts."""

import torch
from torch import Tensor

from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.parts import usage

from .parts import Learner, decoder, encoder, explained, generative
from .quantizer import WIDTH, Codebook

PLACES = 4


class VQVAE(Learner):
    """An autoencoder whose code are four words of a codebook."""

    def __init__(self, restarts: bool) -> None:
        super().__init__(rate=2e-3)
        self.encoder, self.decoder = encoder(PLACES * WIDTH), decoder(PLACES * WIDTH)
        self.codebook = Codebook(restarts)

    def quantize(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions and the loss of the codebook."""
        codes, loss = self.codebook(self.encoder(images).view(-1, WIDTH))
        return self.decoder(codes.view(len(images), -1)), loss

    def fidelity(self, images: Tensor) -> float:
        """Share of the pixels' variance that reconstructions explain."""
        return explained(lambda some: self.quantize(some)[0], images)

    def variety(self, images: Tensor) -> float:
        """Share of the codebook in use, as a perplexity."""
        return usage(-torch.cdist(self.encoder(images).view(-1, WIDTH), self.codebook.codes))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Squared error and the loss of the codebook."""
        images, loss = self.quantize(batch[0])
        return (images - batch[0]).square().mean() * 10 + loss


def make(seed: int, restarts: bool) -> Habitat:
    """Digits without labels."""
    model = VQVAE(restarts)
    return generative(model, seed, model.encoder, model.fidelity, model.variety)


SPECIMEN = Specimen(
    "codebook without restarts",
    make,
    "the code that is nearest first wins all rows",
    kind="prototype_collapse",
    setting="restarts",
    healthy=True,
    sick=False,
    layers=("codebook*",),
    family="vector quantization",
)
