"""Self-supervised learning of tables: rows and their corrupted copies, with or without the covariance term."""

from functools import cache

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from examples.zoo.material import Learner, loader
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor
from lightning_collapse.losses import vicreg_terms

HELD_OUT, STEPS = 169, 500


@cache
def cells() -> Tensor:
    """Thirty measures of 569 cells, standardized."""
    table = torch.tensor(load_breast_cancer(return_X_y=True)[0])
    return ((table - table.mean(dim=0)) / table.std(dim=0, correction=0)).float()


class CorruptedRows(Learner):
    """Views differ in a part of the columns, drawn from other rows (SCARF, Bahri et al. 2022, arXiv 2106.15147)."""

    def __init__(self, covariance: float) -> None:
        super().__init__(rate=2e-3)
        self.covariance = covariance
        widths = (nn.Linear(30, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        self.encoder = nn.Sequential(*(part for layer in widths for part in (layer, nn.SiLU())), nn.Linear(64, 32))

    def corrupt(self, rows: Tensor) -> Tensor:
        """Three of ten columns come from other rows."""
        others = torch.rand_like(rows).argsort(dim=0)
        return torch.where(torch.rand_like(rows) < 0.3, rows.gather(0, others), rows)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """VICReg, with or without its third term."""
        first, second = (self.encoder(self.corrupt(batch[0])) for _ in range(2))
        terms = vicreg_terms(first, second)
        agreement = 25 * nn.functional.mse_loss(first, second)
        return agreement + 25 * terms["variance"] + self.covariance * terms["covariance"]


def ridge_explained(features: Tensor, targets: Tensor, test: Tensor, of_test: Tensor) -> float:
    """Share of the held-out targets' variance that a ridge regression explains."""
    mean, scale = features.mean(dim=0), features.std(dim=0) + 1e-6
    x, z = (torch.cat([(part - mean) / scale, torch.ones(len(part), 1)], dim=1) for part in (features, test))
    weight = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ targets)
    return float(1 - (z @ weight - of_test).square().mean() / of_test.var(dim=0, correction=0).mean())


def make(seed: int, covariance: float) -> Habitat:
    """How well do features tell what was measured?"""
    table = cells()[torch.randperm(len(cells()), generator=torch.Generator().manual_seed(seed))]
    rows, test = table[HELD_OUT:], table[:HELD_OUT]
    model = CorruptedRows(covariance)

    def score() -> float:
        return ridge_explained(model.encoder(rows), rows, model.encoder(test), test)

    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    return Habitat(model, [loader(rows, size=100, seed=seed)], monitors, STEPS, model.encoder, score, every=10)


SPECIMENS = (
    Specimen(
        "corrupted rows without covariance",
        make,
        "nothing keeps features from being the same one",
        kind="dimensional_collapse",
        setting="covariance",
        healthy=5.0,
        sick=0.0,
        claims=("partial_collapse",),
        layers=("encoder*",),
        family="table",
    ),
)
