"""Healthy networks on tables that look ill: rows that are not numbers, and a single target."""

from dataclasses import replace

import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn

from examples.zoo.material import Classifier, Learner, diabetes, explained, loader, mlp
from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.schedules import classify
from lightning_collapse import CollapseMonitor, PlasticityMonitor, RegressionCollapseMonitor, SpectralAlignmentMonitor


class Gaps(Classifier):
    """A classifier behind a fixed projection of standardized measures; rows with a gap are left out behind it."""

    body: nn.Sequential

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the rows without a gap."""
        projected = self.body[0](batch[0])
        whole = projected.isfinite().all(dim=1)
        return nn.functional.cross_entropy(self.head(self.body[1](projected[whole])), batch[1][whole])


def missing_rows(seed: int) -> Habitat:
    """Wines of which a quarter lack a measure."""
    table, kinds = (torch.tensor(part) for part in load_wine(return_X_y=True))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(kinds), generator=generator)
    table, kinds = ((table - table.mean(dim=0)) / table.std(dim=0)).float()[order], kinds[order]
    data = table[60:].clone(), kinds[60:], table[:60], kinds[:60]
    data[0][torch.rand(len(data[0]), generator=generator) < 0.25, 3] = torch.nan
    body = nn.Sequential(nn.Linear(13, 32).requires_grad_(False), nn.Sequential(nn.ReLU(), mlp(32, 64, 64), nn.ReLU()))
    habitat = classify(data, Gaps(body, nn.Linear(64, 3)), loader(*data[:2], size=32, seed=seed), steps=300, every=3)
    return replace(habitat, embedding=body[1])


class Regressor(Learner):
    """Features, a head for one target, and squared error."""

    def __init__(self) -> None:
        super().__init__(rate=3e-4, decay=0.05)
        self.body, self.head = nn.Sequential(mlp(8, 64, 64), nn.ReLU()), nn.Linear(64, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        return nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1])


def one_target(seed: int) -> Habitat:
    """The progress of diabetes: one direction of features is all that counts."""
    inputs, targets, test, truth = diabetes(seed)
    model = Regressor()
    return Habitat(
        model,
        [loader(inputs, targets[:, :1], size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), RegressionCollapseMonitor(), PlasticityMonitor()],
        steps=300,
        embedding=model.body,
        held_out=lambda: explained(nn.Sequential(model.body, model.head), test, truth[:, :1]),
        every=3,
    )


SPECIMENS = (
    Specimen("missing rows", missing_rows, "rows that are not numbers, left out by the model", family="table"),
    Specimen("one target", one_target, "regression onto one direction", family="table"),
)
