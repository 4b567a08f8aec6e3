"""Healthy runs on tables, images and graphs that look dangerous."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Classifier, Learner, accuracy, digits, loader, mlp, neighbour_accuracy, view
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor
from lightning_collapse.losses import vicreg_terms

from .corrupted_rows import HELD_OUT, cells


def deep_tanh(seed: int) -> Habitat:
    """Ten layers of tanh, whose small weights leave few directions at the start."""
    images, labels, test, classes = digits(seed)
    widths = [64] * 8
    body = nn.Sequential(*(part for width in widths for part in (nn.Linear(64, width), nn.Tanh())))
    for layer in body:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
    model = Classifier(body, nn.Linear(64, 10), rate=5e-4)
    return Habitat(
        model,
        [loader(images, labels, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()],
        steps=400,
        every=10,
        embedding=model.body,
        held_out=lambda: accuracy(model, test, classes),
    )


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


class Autoencoder(Learner):
    """A bottleneck of three by design; missing cells are NaN, and their mask keeps them from the loss."""

    def __init__(self) -> None:
        super().__init__(rate=3e-3)
        self.encoder, self.decoder = mlp(60, 64, 3), mlp(3, 64, 30)

    def forward(self, rows: Tensor) -> Tensor:
        """All cells, those that are missing too."""
        there = ~rows.isnan()
        output: Tensor = self.decoder(self.encoder(torch.cat([rows.nan_to_num(), there.float()], dim=1)))
        return output

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Squared error of the cells that are there."""
        rows = batch[0]
        return (self(rows) - rows)[~rows.isnan()].square().mean()


def missing_cells(seed: int) -> Habitat:
    """A tenth of a table is missing, and three directions are left by design."""
    generator = torch.Generator().manual_seed(seed)
    table = cells()[torch.randperm(len(cells()), generator=generator)]
    missing = torch.rand(table.shape, generator=generator) < 0.1
    rows, test = table.masked_fill(missing, torch.nan)[HELD_OUT:], table[:HELD_OUT]
    model = Autoencoder()
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    return Habitat(
        model,
        [loader(rows, size=80, seed=seed)],
        monitors,
        steps=600,
        every=15,
        embedding=model.encoder,
        held_out=lambda: 1 - float((model(test) - test).square().mean() / test.var(dim=0).mean()),
    )


SPECIMENS = (
    Specimen("deep tanh", deep_tanh, "few directions at the start", family="image classifier"),
    Specimen(
        "labels that ride along", labels_ride_along, "labels in a batch whose loss reads none", family="joint embedding"
    ),
    Specimen("missing cells", missing_cells, "NaN in the batch, and a bottleneck of three", family="table"),
)
