"""Codebook collapse: codes that only gradients pull, against moving averages with restarts, and against a matrix."""

import torch
from torch import Tensor

from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.parts import usage
from lightning_collapse import CodebookMonitor

from .parts import Learner, decoder, encoder, explained, generative
from .quantizer import WIDTH, Codebook, Projected, Residual

PLACES = 4
Quantizer = Codebook | Projected | Residual


class VQVAE(Learner):
    """An autoencoder whose code are four words of a codebook."""

    def __init__(self, codebook: Quantizer) -> None:
        super().__init__(rate=2e-3)
        self.encoder, self.decoder = encoder(PLACES * WIDTH), decoder(PLACES * WIDTH)
        self.codebook = codebook

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


def watched(seed: int, codebook: Quantizer) -> Habitat:
    """Digits without labels."""
    model = VQVAE(codebook)
    monitors = (CodebookMonitor(),)
    return generative(model, seed, model.encoder, model.fidelity, model.variety, monitors=monitors)


def make(seed: int, restarts: bool) -> Habitat:
    """Codes that begin near zero."""
    return watched(seed, Codebook(restarts))


def alone(seed: int) -> Habitat:
    """Codes that begin as far apart as rows do: in so small a codebook nearly all are drawn along."""
    return watched(seed, Projected(matrix=False))


def projected(seed: int) -> Habitat:
    """Codes of a frozen table, behind a Linear."""
    return watched(seed, Projected(matrix=True))


def residual(seed: int) -> Habitat:
    """Three levels, of which the later ones have little left to say."""
    return watched(seed, Residual())


SPECIMENS = (
    Specimen(
        "codebook without restarts",
        make,
        "the code that is nearest first wins all rows",
        kind="codebook_collapse",
        setting="restarts",
        healthy=True,
        sick=False,
        layers=("codebook*",),
        claims=("prototype_collapse",),
        family="vector quantization",
    ),
    Specimen("codes without a matrix", alone, "only codes that are chosen move", family="vector quantization"),
    Specimen("codes behind a matrix", projected, "all codes move at once", family="vector quantization"),
    Specimen("residual levels", residual, "later levels say less", family="vector quantization"),
)
