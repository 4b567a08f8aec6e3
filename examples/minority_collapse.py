"""Do rare classes lose their place in the classifier? Handwritten digits, five of the ten kept only in part.

Run: ``python examples/minority_collapse.py`` (four minutes on one core; with ``--quick`` one short run each).
"""

import argparse
import logging
import statistics
import warnings
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse.functional import gof_error, norm_count_slope, orthogonal_frame
from lightning_collapse.metrics import NeuralCollapse

CLASSES, MINORITY, WIDTH, BATCH, PER_CLASS, HELD_OUT = 10, slice(5, 10), 128, 64, 130, 40
RATIOS = (1, 10, 100)
LOSSES = ("cross-entropy", "squared error")
DECAY = 5e-4
WEIGHT_DECAY, FEATURE_DECAY = 1e-2, 1e-3
"""With the squared error, as the unconstrained feature model has them: of the head, and of the features."""


class Classifier(LightningModule):
    """Two hidden layers and a head without a bias; cross-entropy and weight decay, or the model of the theory."""

    def __init__(self, loss: str, images: int, steps: int) -> None:
        super().__init__()
        self.loss, self.images, self.steps = loss, images, steps
        self.body = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss; for the squared error that of :func:`~lightning_collapse.functional.orthogonal_frame`."""
        images, labels = batch
        features = self.body(images)
        logits = self.head(features)
        if self.loss == "cross-entropy":
            return nn.functional.cross_entropy(logits, labels)
        error = (logits - nn.functional.one_hot(labels, CLASSES)).square().sum(dim=1).mean()
        length = features.square().sum(dim=1).mean()  # the theory sums over all images
        total: Tensor = 0.5 * (
            error + self.images * FEATURE_DECAY * length + WEIGHT_DECAY * self.head.weight.square().sum()
        )
        return total

    def configure_optimizers(self) -> Any:
        """SGD, a tenth of the rate after a third and after two thirds of the steps."""
        decay = DECAY if self.loss == "cross-entropy" else 0.0
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
        drops = [self.steps // 3, 2 * self.steps // 3]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Reading(NamedTuple):
    """What one trained model reads, in eval mode."""

    minority_cosine: float  # mean over pairs of rows of the classifier
    majority_cosine: float
    gof_weight: float
    gof_means: float
    slope: float  # of the log length of the classifier's rows on log class size
    shortest: float  # squared length of the shortest row
    predicted: float  # the same by theory, which is for the squared error
    collapsed: float  # classes whose rows vanish by theory
    minority_accuracy: float
    majority_accuracy: float


def digits(ratio: int, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """130 images of each digit below five and ``130 // ratio`` of the others to train on; 40 of each held out."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows, classes = images[order].float() / 16, labels[order]
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for digit in range(CLASSES):
        of_digit = (classes == digit).nonzero().flatten()
        kept = PER_CLASS if digit < MINORITY.start else PER_CLASS // ratio
        parts[0].append(of_digit[HELD_OUT : HELD_OUT + kept])
        parts[1].append(of_digit[:HELD_OUT])
    train, test = (torch.cat(part) for part in parts)
    return TensorDataset(rows[train], classes[train]), TensorDataset(rows[test], classes[test])


@torch.no_grad()
def read(model: Classifier, train: TensorDataset, test: TensorDataset) -> Reading:
    """Measure."""
    model.eval()
    images, labels = train.tensors
    metric = NeuralCollapse(CLASSES, WIDTH)
    metric.update(model.body(images), labels)
    moments, weight = metric.moments(), model.head.weight
    theory = orthogonal_frame(moments.count, WEIGHT_DECAY, FEATURE_DECAY)
    rows, classes = test.tensors
    right = (model.head(model.body(rows)).argmax(dim=1) == classes).double()
    minority = classes >= MINORITY.start  # as many held out of each class: the mean is balanced
    return Reading(
        minority_cosine=_cosine(weight[MINORITY]),
        majority_cosine=_cosine(weight[: MINORITY.start]),
        gof_weight=gof_error(weight).item(),
        gof_means=gof_error(moments.means).item(),
        slope=norm_count_slope(weight, moments.count).item(),
        shortest=weight.square().sum(dim=1).amin().item(),
        predicted=theory.weight.amin().item(),
        collapsed=theory.collapsed.sum().item(),
        minority_accuracy=right[minority].mean().item(),
        majority_accuracy=right[~minority].mean().item(),
    )


def _cosine(rows: Tensor) -> float:
    """Mean over the pairs."""
    units = nn.functional.normalize(rows, dim=1)
    return (units @ units.T)[tuple(torch.triu_indices(len(rows), len(rows), 1))].mean().item()


def classify(loss: str, ratio: int, seed: int, steps: int) -> Reading:
    """Train once, and read."""
    seed_everything(seed, verbose=False)
    train, test = digits(ratio, seed)
    model = Classifier(loss, len(train), steps)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=BATCH, shuffle=True, drop_last=True))
    return read(model, train, test)


NAMES = {
    "cosine of minority rows": "minority_cosine",
    "of majority rows": "majority_cosine",
    "GOF error of rows": "gof_weight",
    "of class means": "gof_means",
    "slope": "slope",
    "shortest row, squared": "shortest",
    "minority accuracy": "minority_accuracy",
    "majority accuracy": "majority_accuracy",
}


def table(runs: dict[tuple[str, int, int], Reading]) -> str:
    """Per loss and imbalance the median over the seeds and the range, in Markdown."""
    lines = [f"| loss | imbalance | {' | '.join(NAMES)} |", "|---" * (2 + len(NAMES)) + "|"]
    for loss in LOSSES:
        for ratio in RATIOS:
            some = [reading for (a, b, _), reading in runs.items() if (a, b) == (loss, ratio)]
            cells = {name: _said([getattr(reading, field) for reading in some]) for name, field in NAMES.items()}
            if loss == "squared error":
                count = f", {some[0].collapsed:.0f} classes vanish" if some[0].collapsed else ""
                cells["shortest row, squared"] += f"; theory {some[0].predicted:.2g}{count}"
            lines.append(f"| {loss} | 1:{ratio} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


def _said(values: list[float]) -> str:
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def main(steps: int = 3000, seeds: int = 3) -> None:
    """Train all runs and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        runs = {
            (loss, ratio, seed): classify(loss, ratio, seed, steps)
            for loss in LOSSES
            for ratio in RATIOS
            for seed in range(seeds)
        }
    print(table(runs))
    ends = [
        [runs[LOSSES[0], ratio, seed].minority_cosine for seed in range(seeds)] for ratio in (RATIOS[0], RATIOS[-1])
    ]
    balanced, rare = (statistics.median(end) for end in ends)
    print(
        f"\nAfter {steps} steps of cross-entropy the cosine of the minority's rows was {balanced:.2f} at 1:{RATIOS[0]}"
        f" and {rare:.2f} at 1:{RATIOS[-1]}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps: to see that it runs")
    main(*((60, 1) if parser.parse_args().quick else ()))
