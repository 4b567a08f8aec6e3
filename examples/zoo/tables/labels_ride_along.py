"""Healthy self-supervised learning whose batches hold labels that nothing reads."""

from torch import Tensor, nn

from examples.zoo.material import Learner, digits, loader, mlp, neighbour_accuracy, view
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor
from lightning_collapse.losses import vicreg_terms


class Labelled(Learner):
    """VICReg on images whose labels ride along in the batch, unread."""

    def __init__(self) -> None:
        super().__init__(rate=2e-3)
        self.encoder = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 48)
        )
        self.expander = mlp(48, 96, 96, norm=True)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Published weights (Bardes et al. 2022, arXiv 2105.04906)."""
        first, second = (self.expander(self.encoder(view(batch[0]))) for _ in range(2))
        terms = vicreg_terms(first, second)
        return 25 * nn.functional.mse_loss(first, second) + 25 * terms["variance"] + terms["covariance"]


def labels_ride_along(seed: int) -> Habitat:
    """Digits with labels that the loss does not read."""
    data, model = digits(seed), Labelled()
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    loaders = [loader(data[0], data[1], size=96, seed=seed)]
    return Habitat(model, loaders, monitors, 300, model.encoder, lambda: neighbour_accuracy(model.encoder, data), 10)


SPECIMENS = (
    Specimen(
        "labels that ride along", labels_ride_along, "labels in a batch whose loss reads none", family="joint embedding"
    ),
)
