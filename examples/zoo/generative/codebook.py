"""Codebook collapse: a VQ-VAE whose codes are pulled by gradients only, against moving averages and restarts."""

import torch
from torch import Tensor, nn

from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.parts import usage

from .parts import Learner, decoder, encoder, explained, generative

CODES, WIDTH, PLACES = 64, 8, 4


class Codebook(nn.Module):
    """The nearest of some codes.

    Args:
        restarts: Whether codes that none chose are put where a random row is; the others follow the rows they won.
    """

    counts: Tensor

    def __init__(self, restarts: bool) -> None:
        super().__init__()
        self.restarts = restarts
        self.codes = nn.Parameter((2 * torch.rand(CODES, WIDTH) - 1) / CODES, requires_grad=not restarts)
        self.register_buffer("counts", torch.ones(CODES))

    def choose(self, rows: Tensor) -> Tensor:
        """The number of the nearest code."""
        return torch.cdist(rows, self.codes).argmin(dim=1)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of rows, with the gradient of the rows, and the loss that draws both together."""
        chosen = self.choose(rows.detach())
        if self.restarts and self.training:
            self._follow(rows.detach(), chosen)
        codes = self.codes[chosen]
        loss = (codes - rows.detach()).square().mean() + 0.25 * (codes.detach() - rows).square().mean()
        return rows + (codes - rows).detach(), loss

    @torch.no_grad()
    def _follow(self, rows: Tensor, chosen: Tensor) -> None:
        won = nn.functional.one_hot(chosen, CODES).type_as(rows)
        self.counts.lerp_(won.sum(dim=0), 0.05)
        means = (won.T @ rows) / won.sum(dim=0).clamp_min(1).unsqueeze(1)
        self.codes.lerp_(torch.where(won.any(dim=0).unsqueeze(1), means, self.codes), 0.2)
        idle = (self.counts < 0.05).unsqueeze(1)
        self.codes.copy_(torch.where(idle, rows[torch.randint(len(rows), (CODES,))], self.codes))
        self.counts.masked_fill_(idle.squeeze(1), 1.0)


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
