"""A dead bottleneck: an autoencoder whose penalty on the code is dearer than all that the code could say."""

from torch import Tensor, nn

from examples.zoo.specimen import Habitat, Specimen

from .parts import Learner, decoder, encoder, explained, generative


class Sparse(Learner):
    """A convolutional autoencoder with a rectified code and an L1 penalty on it."""

    def __init__(self, penalty: float) -> None:
        super().__init__(rate=2e-3)
        self.penalty = penalty
        self.encoder, self.decoder = nn.Sequential(encoder(32), nn.ReLU()), decoder(32)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions."""
        reconstruction: Tensor = self.decoder(self.encoder(images))
        return reconstruction

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Squared error and penalty."""
        code = self.encoder(batch[0])
        error: Tensor = (self.decoder(code) - batch[0]).square().flatten(1).sum(dim=1).mean()
        total: Tensor = error + self.penalty * code.abs().sum(dim=1).mean()
        return total


def make(seed: int, penalty: float) -> Habitat:
    """Digits without labels."""
    model = Sparse(penalty)
    return generative(model, seed, model.encoder, lambda test: explained(model, test))


SPECIMEN = Specimen(
    "dead bottleneck",
    make,
    "an L1 penalty silences every unit of the code",
    kind="complete_collapse",
    setting="penalty",
    healthy=0.01,
    sick=5.0,
    family="autoencoder",
    layers=("encoder*", "decoder*"),
    claims=("dimensional_collapse", "plasticity_loss"),
)
