"""Does weight decay fold the features of a regression onto as few dimensions as it has targets? Diabetes data, an MLP.

Run: ``python examples/regression_collapse.py`` (eight minutes on a core; with ``--quick`` one short run of each kind).
"""

import argparse
import logging
import statistics
import warnings
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseGuard, RegressionCollapseMonitor
from lightning_collapse.callbacks import Verdict
from lightning_collapse.functional import two_nn
from lightning_collapse.metrics import RegressionCollapse

DECAYS = (0.0, 5e-4, 5e-3, 2e-2)
WIDTH, BATCH, RATE, HELD_OUT = 256, 64, 0.02, 88
TARGETS = ("disease progression", "body mass index", "blood pressure")


class Regressor(LightningModule):
    """Four hidden layers of 256, and a linear head."""

    def __init__(self, inputs: int, weight_decay: float, steps: int) -> None:
        super().__init__()
        self.weight_decay, self.steps = weight_decay, steps
        widths = (inputs, WIDTH, WIDTH, WIDTH, WIDTH)
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, len(TARGETS))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        rows, targets = batch
        return nn.functional.mse_loss(self.head(self.body(rows)), targets)

    def configure_optimizers(self) -> Any:
        """SGD, a tenth of the rate in the last quarter."""
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3 * self.steps // 4])
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Reading(NamedTuple):
    """What one trained model reads, over all rows it was trained on, in eval mode."""

    verdicts: int
    nrc1: float
    nrc2: float
    nrc3: float
    feature_dimension: float
    target_dimension: float
    train_error: float
    test_error: float


def diabetes(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """354 patients to train on, 88 held out: three of the eleven columns are predicted from the other eight.

    Targets are the progression of the disease, body mass index and blood pressure; inputs are age, sex and the six
    blood values. All are standardized by the patients to train on.
    """
    measured, progression = load_diabetes(return_X_y=True, scaled=False)
    table = torch.cat([torch.tensor(progression).unsqueeze(1), torch.tensor(measured)], dim=1)
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))]
    mean, std = table[HELD_OUT:].mean(dim=0), table[HELD_OUT:].std(dim=0, correction=0)
    table = ((table - mean) / std).float()
    targets, inputs = table[:, [0, 3, 4]], table[:, [1, 2, 5, 6, 7, 8, 9, 10]]
    return TensorDataset(inputs[HELD_OUT:], targets[HELD_OUT:]), TensorDataset(inputs[:HELD_OUT], targets[:HELD_OUT])


@torch.no_grad()
def read(model: Regressor, train: TensorDataset, test: TensorDataset, verdicts: int) -> Reading:
    """Measure."""
    model.eval()
    rows, targets = train.tensors
    features = model.body(rows)
    metric = RegressionCollapse(WIDTH, len(TARGETS))
    metric.update(features, targets)
    values = metric.compute(model.head.weight)
    errors = [nn.functional.mse_loss(model.head(model.body(x)), y).item() for x, y in (train.tensors, test.tensors)]
    dimensions = [two_nn(points).dimension.item() for points in (features, targets)]
    collapse = [values[name].item() for name in ("nrc1", "nrc2", "nrc3")]
    return Reading(verdicts, *collapse, *dimensions, *errors)


def regress(weight_decay: float, seed: int, steps: int) -> tuple[Reading, Reading]:
    """What a model reads before training and after it."""
    seed_everything(seed, verbose=False)
    train, test = diabetes(seed)
    model = Regressor(train.tensors[0].shape[1], weight_decay, steps)
    before = read(model, train, test, 0)
    verdicts: list[Verdict] = []
    guard = CollapseGuard(action=lambda trainer, module, verdict: verdicts.append(verdict))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[RegressionCollapseMonitor(every_n_steps=max(steps // 20, 1), rows=320), guard],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.train()
    trainer.fit(model, DataLoader(train, batch_size=BATCH, shuffle=True, drop_last=True))
    return before, read(model, train, test, len(verdicts))


NAMES = {
    "NRC1": "nrc1",
    "NRC2": "nrc2",
    "NRC3": "nrc3",
    "ID of features": "feature_dimension",
    "ID of targets": "target_dimension",
    "training error": "train_error",
    "test error": "test_error",
}


def table(runs: dict[tuple[float, int], tuple[Reading, Reading]]) -> str:
    """Per weight decay the median over the seeds and the range, in Markdown."""
    lines = [f"| weight decay | {' | '.join(NAMES)} | runs the guard warns of |", "|---" * (2 + len(NAMES)) + "|"]
    readings = {"before training": [before for (decay, _), (before, _) in runs.items() if decay == DECAYS[0]]}
    for decay in DECAYS:
        readings[f"{decay:g}"] = [after for (some, _), (_, after) in runs.items() if some == decay]
    for row, some in readings.items():
        cells = [_said([getattr(reading, name) for reading in some]) for name in NAMES.values()]
        lines.append(f"| {row} | {' | '.join(cells)} | {sum(r.verdicts > 0 for r in some)} of {len(some)} |")
    return "\n".join(lines)


def _said(values: list[float]) -> str:
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def main(steps: int = 6000, seeds: int = 3) -> None:
    """Train all runs and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        runs = {(decay, seed): regress(decay, seed, steps) for decay in DECAYS for seed in range(seeds)}
    print(table(runs))
    none = statistics.median(after.nrc1 for (decay, _), (_, after) in runs.items() if decay == 0)
    least = min(after.nrc1 for _, after in runs.values())
    print(f"\nAfter {steps} steps NRC1 was {none:.2g} without weight decay, and {least:.2g} where it was lowest.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps: to see that it runs")
    main(*((60, 1) if parser.parse_args().quick else ()))
