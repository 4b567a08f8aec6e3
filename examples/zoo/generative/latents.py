"""Latents that die: of an error averaged over pixels, and of rectifiers that are born dead."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, digits, loader, mlp, neighbour_accuracy
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, LatentMonitor, SpectralAlignmentMonitor

STEPS = 400


class VAE(Learner):
    """The variational autoencoder of PyTorch's own example, for 8 x 8 digits.

    Args:
        units: Width of the latent.
        hidden: Widths of the layers of the encoder.
        reduction: Of the error over pixels and images: ``"sum"`` is the negative log-likelihood, ``"mean"`` is not.
        warm_up: Steps in which the weight of the divergence rises to one.
        inputs: Pixels.
    """

    def __init__(
        self,
        units: int = 20,
        hidden: tuple[int, ...] = (128,),
        reduction: str = "sum",
        warm_up: int = 0,
        inputs: int = 64,
    ) -> None:
        super().__init__(rate=1e-3)
        self.reduction, self.warm_up = reduction, warm_up
        self.encoder = nn.Sequential(mlp(inputs, *hidden), nn.ReLU())
        self.fc_mu, self.fc_logvar = nn.Linear(hidden[-1], units), nn.Linear(hidden[-1], units)
        self.decoder = nn.Sequential(nn.Linear(units, 128), nn.ReLU(), nn.Linear(128, inputs))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of pixels, and divergence."""
        images = batch[0]
        features = self.encoder(images)
        mu, logvar = self.fc_mu(features), self.fc_logvar(features)
        code = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        error = nn.functional.binary_cross_entropy_with_logits(self.decoder(code), images, reduction=self.reduction)
        divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum()
        weight = min((self.global_step + 1) / max(self.warm_up, 1), 1.0)
        total: Tensor = (error if self.reduction == "mean" else error / len(images)) + weight * divergence / len(images)
        return total


def habitat(model: VAE, seed: int) -> Habitat:
    """Digits without labels."""
    data = digits(seed)
    return Habitat(
        model,
        [loader(data[0], size=128, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), LatentMonitor()],
        steps=STEPS,
        embedding=model.fc_mu,
        held_out=lambda: neighbour_accuracy(nn.Sequential(model.encoder, model.fc_mu), data),
        every=10,
    )


def averaged(seed: int, reduction: str) -> Habitat:
    """A weight of 1 as published, and an error that is 64 times too small beside it."""
    return habitat(VAE(reduction=reduction), seed)


def dying(seed: int, hidden: tuple[int, ...]) -> Habitat:
    """A latent of the plane; a deep encoder of rectifiers as narrow is constant from birth (Lu et al., 2019)."""
    return habitat(VAE(units=2, hidden=hidden), seed)


def warmed_up(seed: int) -> Habitat:
    """The weight of the divergence rises from 0 to 1."""
    return habitat(VAE(warm_up=200), seed)


SPECIMENS = (
    Specimen(
        "error averaged over pixels",
        averaged,
        "the divergence is summed over units, and the error is not summed over pixels",
        kind="posterior_collapse",
        setting="reduction",
        healthy="sum",
        sick="mean",
        layers=("fc_mu*", "fc_logvar*", "decoder*"),
        family="latent",
        claims=("complete_collapse", "dimensional_collapse"),
    ),
    Specimen(
        "dying bottleneck",
        dying,
        "ten layers of two rectifiers say the same of all images from birth",
        kind="posterior_collapse",
        setting="hidden",
        healthy=(128,),
        sick=(2,) * 10,
        layers=("encoder*", "fc_mu*", "fc_logvar*", "decoder*"),
        develops=False,
        family="latent",
        claims=("point_collapse", "complete_collapse", "dimensional_collapse", "plasticity_loss"),
    ),
    Specimen("warm-up of the divergence", warmed_up, "a latent that shrinks as its prior is told", family="latent"),
)
