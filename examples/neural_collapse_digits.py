"""Does neural collapse go on when no training error is left? An MLP on digits, with and without weight decay.

Run: ``python examples/neural_collapse_digits.py`` (four minutes on a core; with ``--quick`` a short run of each kind).
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from itertools import pairwise
from math import nan
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse.functional import nc4
from lightning_collapse.metrics import NeuralCollapse

CLASSES, WIDTH, BATCH, RATE, HELD_OUT = 10, 128, 128, 0.0679, 360
KINDS = {
    "BatchNorm, decay 5e-4": (True, 5e-4),
    "BatchNorm, no decay": (True, 0.0),
    "plain, decay 5e-4": (False, 5e-4),
    "plain, no decay": (False, 0.0),
}
MEASURES = ("nc1", "nc2_equinorm", "nc2_equiangular", "nc3")


class Classifier(LightningModule):
    """Two hidden layers; optimizer, learning rate and its two drops are those of Papyan, Han & Donoho (2020)."""

    def __init__(self, normed: bool, weight_decay: float, steps: int) -> None:
        super().__init__()
        self.weight_decay, self.steps = weight_decay, steps
        self.body = nn.Sequential()
        for inputs, outputs in pairwise((64, WIDTH, WIDTH)):
            norm = nn.BatchNorm1d(outputs) if normed else nn.Identity()
            self.body.extend([nn.Linear(inputs, outputs), norm, nn.ReLU()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self.head(self.body(images)), labels)

    def configure_optimizers(self) -> Any:
        """SGD, a tenth of the rate after a third and after two thirds of the steps."""
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9, weight_decay=self.weight_decay)
        drops = [self.steps // 3, 2 * self.steps // 3]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class EvaluationPass(Callback):
    """After an epoch: the errors; and all of neural collapse where training error has just ended, and ever more rarely.

    In eval mode, over the whole of the training images.
    """

    def __init__(self, train: TensorDataset, test: TensorDataset) -> None:
        self.train, self.test = train.tensors, test.tensors
        self.points: dict[int, dict[str, float]] = {}
        self.zero_error: int | None = None
        self._next = 1.0

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where it is due."""
        assert isinstance(pl_module, Classifier)
        epoch = trainer.current_epoch + 1
        pl_module.eval()
        first = self.zero_error is None and _error(pl_module, *self.train) == 0
        if first:
            self.zero_error = epoch
        if first or epoch >= self._next or trainer.global_step >= trainer.max_steps:
            self._next = max(self._next, 1.3 * epoch)
            self.points[epoch] = self._measure(pl_module)
        pl_module.train()

    def _measure(self, module: Classifier) -> dict[str, float]:
        images, labels = self.train
        features = module.body(images)
        metric = NeuralCollapse(CLASSES, WIDTH)
        metric.update(features, labels)
        values = metric.compute(module.head.weight, module.head.bias)
        values["nc4"] = nc4(features, module.head(features), metric.moments().means)
        values["test error"] = torch.tensor(_error(module, *self.test))
        return {name: values[name].item() for name in (*MEASURES, "nc4", "test error")}


def _error(module: Classifier, images: Tensor, labels: Tensor) -> float:
    wrong: Tensor = module.head(module.body(images)).argmax(dim=1) != labels
    return wrong.double().mean().item()


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """1437 images to train on, 360 held out."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows, classes = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return TensorDataset(rows[HELD_OUT:], classes[HELD_OUT:]), TensorDataset(rows[:HELD_OUT], classes[:HELD_OUT])


def collapse(kind: str, seed: int, steps: int) -> EvaluationPass:
    """Train once."""
    seed_everything(seed, verbose=False)
    train, test = digits(seed)
    watch = EvaluationPass(train, test)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(train, batch_size=BATCH, shuffle=True, drop_last=True)
    trainer.fit(Classifier(*KINDS[kind], steps), loader)
    return watch


def table(runs: dict[tuple[str, int], EvaluationPass]) -> str:
    """Of each kind the median over the seeds and the range, in Markdown."""
    names = (*MEASURES, "nc4", "test error")
    lines = [f"| run | when | epoch | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for kind in KINDS:
        of_kind = [run for (some, _), run in runs.items() if some == kind]
        whens: dict[str, Callable[[EvaluationPass], int | None]] = {
            "first without training error": lambda run: run.zero_error,
            "end": lambda run: max(run.points),
        }
        for when, epoch_of in whens.items():
            epochs = [(run, epoch) for run in of_kind if (epoch := epoch_of(run)) is not None]
            if not epochs:
                continue
            cells = [_said([float(epoch) for _, epoch in epochs])]
            cells += [_said([run.points[epoch][name] for run, epoch in epochs]) for name in names]
            lines.append(f"| {kind} | {when} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def fell(run: EvaluationPass) -> float:
    """The last nc1 over the one when training error ended; NaN where it did not."""
    return nan if run.zero_error is None else run.points[max(run.points)]["nc1"] / run.points[run.zero_error]["nc1"]


def main(steps: int = 3300, seeds: int = 3) -> None:
    """Train all runs and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        runs = {(kind, seed): collapse(kind, seed, steps) for kind in KINDS for seed in range(seeds)}
    print(table(runs))
    print()
    for kind in KINDS:
        curve = ", ".join(f"{epoch}: {point['nc1']:.2g}" for epoch, point in runs[kind, 0].points.items())
        print(f"{kind}: nc1 by epoch, seed 0: {curve}")
    parts = [f"{statistics.median(fell(runs[kind, seed]) for seed in range(seeds)):.2g} ({kind})" for kind in KINDS]
    print(f"\nAfter {steps} steps nc1 is this part of what it was when training error ended: {', '.join(parts)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps: to see that it runs")
    main(*((60, 1) if parser.parse_args().quick else ()))
