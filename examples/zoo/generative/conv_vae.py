"""Posterior collapse: a decoder that sees the pixels before needs no code, and the prior takes it away."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import LatentMonitor, PlasticityMonitor

from .parts import decoder, encoder, generative


class VAE(Learner):
    """A variational autoencoder whose decoder also sees every pixel's upper, left and upper left neighbours.

    Args:
        beta: Weight of the divergence of codes from the prior.
    """

    def __init__(self, beta: float) -> None:
        super().__init__(rate=2e-3)
        self.beta = beta
        self.encoder, self.mean, self.log_variance = encoder(64), nn.Linear(64, 8), nn.Linear(64, 8)
        self.decoder = decoder(8)
        self.local = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 1, 1))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of codes."""
        features = self.encoder(images).relu()
        return self.mean(features), self.log_variance(features)

    def sample(self, images: Tensor) -> Tensor:
        """Codes with their noise."""
        mean, log_variance = self.encode(images)
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)

    def error(self, code: Tensor, images: Tensor) -> Tensor:
        """Squared error of pixels, from the code and the neighbours before them."""
        padded = nn.functional.pad(images, (1, 0, 1, 0))
        before = torch.cat([padded[:, :, :-1, 1:], padded[:, :, 1:, :-1], padded[:, :, :-1, :-1]], dim=1)
        pixels: Tensor = self.decoder(code) + self.local(before)
        return (pixels - images).square().flatten(1).sum(dim=1).mean()

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Squared error and divergence."""
        mean, log_variance = self.encode(batch[0])
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
        return self.error(code, batch[0]) + self.beta * divergence


def told(model: VAE, images: Tensor) -> float:
    """By which share the error grows less with an image's own code than with that of another: what the code tells."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        code = model.sample(images)
    return float(1 - model.error(code, images) / model.error(code.roll(1, dims=0), images))


def make(seed: int, beta: float) -> Habitat:
    """Digits without labels."""
    model = VAE(beta)
    monitors = (PlasticityMonitor(), LatentMonitor())
    return generative(model, seed, model.mean, lambda test: told(model, test), monitors=monitors, every=4)


SPECIMEN = Specimen(
    "code beside a strong decoder",
    make,
    "all codes follow the prior, and the decoder reads none of them",
    kind="posterior_collapse",
    setting="beta",
    healthy=0.05,
    sick=4.0,
    layers=("encoder*", "mean*", "log_variance*", "decoder*"),
    family="autoencoder",
    claims=("complete_collapse", "dimensional_collapse", "partial_collapse"),
)
