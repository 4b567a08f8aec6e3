"""Posterior collapse: the weight of the divergence in a variational autoencoder presses the code onto one point."""

import torch
from torch import Tensor, nn

from lightning_collapse import CollapseMonitor, LatentMonitor, SpectralAlignmentMonitor

from .material import Learner, cool_down, digits, loader, mlp, neighbour_accuracy
from .specimen import Habitat, Specimen

STEPS = 300


class Autoencoder(Learner):
    """A variational autoencoder; ``beta`` weights the divergence of codes from the prior."""

    def __init__(self, beta: float) -> None:
        super().__init__(rate=5e-3, schedule=cool_down(STEPS))
        self.beta = beta
        self.encoder = nn.Sequential(mlp(64, 128), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(128, 16), nn.Linear(128, 16)
        self.decoder = mlp(16, 128, 64)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Squared error and divergence."""
        features = self.encoder(batch[0])
        mean, log_variance = self.mean(features), self.log_variance(features)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        error = (self.decoder(code) - batch[0]).square().sum(dim=1).mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
        total: Tensor = error + self.beta * divergence
        return total


def make(seed: int, beta: float) -> Habitat:
    """Digits without labels."""
    data = digits(seed)
    model = Autoencoder(beta)
    codes = nn.Sequential(model.encoder, model.mean)
    return Habitat(
        model,
        [loader(data[0], size=128, seed=seed)],
        [CollapseMonitor(layers=["encoder", "mean", "decoder"]), SpectralAlignmentMonitor(), LatentMonitor()],
        steps=STEPS,
        embedding=model.mean,
        held_out=lambda: neighbour_accuracy(codes, data),
    )


SPECIMEN = Specimen(
    "posterior collapse",
    make,
    "a heavy prior leaves the code of an autoencoder empty",
    kind="posterior_collapse",
    setting="beta",
    healthy=0.05,
    sick=5.0,
    layers=("mean", "decoder*"),
    family="autoencoder",
    claims=("complete_collapse",),
)
