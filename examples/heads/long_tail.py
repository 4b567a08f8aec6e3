"""Which head or loss gives rare classes their place back? Digits, five of the ten kept only in part.

Run: ``python examples/heads/long_tail.py`` (seven minutes on one core; with ``--quick`` one short run each).
"""

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from small_digits import Rows, is_quick, median, table
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, one_hot
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_collapse.callbacks import MaxNorm
from lightning_collapse.layers import ETFClassifier
from lightning_collapse.losses import BalancedSoftmax, DotRegression, LongTailCollapse
from lightning_collapse.metrics import NeuralCollapse

CLASSES, RARE, WIDTH, BATCH, PER_CLASS, HELD_OUT = 10, 5, 128, 64, 130, 40
RATIOS = (10, 100)
WAYS = (
    "cross-entropy",
    "cross-entropy, BatchNorm",
    "simplex, dot regression",
    "simplex, dot regression by batch",
    "balanced softmax",
    "cross-entropy, long-tail collapse",
    "weight decay 5e-3",
)
STAGES = ("then weight balancing, as released", "then weight balancing, with a softmax")
RATE, DECAY, BETA = 0.05, 5e-4, 0.9999


class Classifier(LightningModule):
    """Two hidden layers and a head without a bias."""

    class_weights: Tensor

    def __init__(self, way: str, counts: Tensor, steps: int) -> None:
        super().__init__()
        self.way, self.steps = way, steps
        self.body = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        if "BatchNorm" in way or "simplex" in way:  # the authors of the simplex have one before it
            self.body.append(nn.BatchNorm1d(WIDTH))
        self.head = ETFClassifier(WIDTH, CLASSES) if "simplex" in way else nn.Linear(WIDTH, CLASSES, bias=False)
        self.dot = DotRegression(self.head, "batch" if "by batch" in way else "equal") if "simplex" in way else None
        self.balanced = BalancedSoftmax(counts) if way == "balanced softmax" else None
        self.tail = LongTailCollapse(CLASSES, WIDTH) if "long-tail" in way else None
        weights = (1 - BETA) / (1 - BETA**counts)
        self.register_buffer("class_weights", weights * CLASSES / weights.sum())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of the way."""
        images, labels = batch
        features = self.body(images)
        if self.dot is not None:
            loss: Tensor = self.dot(self.head.embed(features), labels)  # type: ignore[operator]
            return loss
        logits = self.head(features)
        if self.way == STAGES[0]:  # as their code has it: every class is a question of its own
            weights = self.class_weights[labels].unsqueeze(1)
            return binary_cross_entropy(logits.softmax(dim=1), one_hot(labels, CLASSES).float(), weights)
        if self.way == STAGES[1]:
            return cross_entropy(logits, labels, self.class_weights)
        loss = cross_entropy(logits, labels) if self.balanced is None else self.balanced(logits, labels)
        return loss if self.tail is None else loss + self.tail(features, labels)

    def configure_optimizers(self) -> Any:
        """SGD; the second stage trains the head alone, at a rate and a decay of its own."""
        if self.way in STAGES:
            optimizer = torch.optim.SGD(self.head.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
            return [optimizer], [{"scheduler": cosine, "interval": "step"}]
        decay = 5e-3 if self.way == "weight decay 5e-3" else DECAY
        groups: list[dict[str, Any]] = [{"params": [*self.body.parameters(), *self.head.parameters()]}]
        if self.tail is not None:
            means = {"params": self.tail.parameters(), "weight_decay": 0.0}
            groups.append(means | {"lr": RATE / self.tail.coefficients["within"]})
        optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, weight_decay=decay)
        drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.steps // 3, 2 * self.steps // 3])
        return [optimizer], [{"scheduler": drops, "interval": "step"}]


def parts(ratio: int, seed: int) -> tuple[Rows, Rows]:
    """130 images of each digit below five and ``130 // ratio`` of the others to train on; 40 of each held out."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows, classes = images[order].float() / 16, labels[order]
    kept: list[Tensor] = []
    held: list[Tensor] = []
    for digit in range(CLASSES):
        of_digit = (classes == digit).nonzero().flatten()
        kept.append(of_digit[HELD_OUT:][: PER_CLASS if digit < CLASSES - RARE else PER_CLASS // ratio])
        held.append(of_digit[:HELD_OUT])
    first, second = torch.cat(kept), torch.cat(held)
    return Rows(rows[first], classes[first]), Rows(rows[second], classes[second])


def fit(model: Classifier, rows: Rows, callbacks: list[Callback]) -> None:
    """For the steps of the model."""
    data = TensorDataset(*rows)
    loader = DataLoader(data, sampler=BatchSampler(RandomSampler(data), BATCH, drop_last=True), batch_size=None)
    Trainer(
        accelerator="cpu",
        max_steps=model.steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, loader)


@torch.no_grad()
def read(model: Classifier, rows: Rows, held: Rows) -> dict[str, float]:
    """Accuracy on held-out images, and the geometry of the training images, in eval mode."""
    model.eval()
    right = (model.head(model.body(held.images)).argmax(dim=1) == held.digits).double()
    rare = held.digits >= CLASSES - RARE
    metric = NeuralCollapse(CLASSES, WIDTH)
    metric.update(model.body(rows.images), rows.digits)
    found = metric.compute(weight=model.head.weight)
    geometry = {
        "minority cosine": found["minority_cosine"],
        "slope of rows": found["norm_count_slope"],
        "GOF error": found["gof_error"],
        "NC1": found["nc1"],
    }
    accuracy = {"minority accuracy": right[rare].mean(), "majority accuracy": right[~rare].mean()}
    # rows of one length have a slope of rounding
    return {name: round(value.item(), 6) for name, value in (accuracy | geometry).items()}


def classify(ratio: int, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Train every way once, and read; weight balancing goes on from the last one."""
    rows, held = parts(ratio, seed)
    counts, found = rows.digits.bincount(minlength=CLASSES).float(), {}
    for way in WAYS:
        seed_everything(seed, verbose=False)
        model = Classifier(way, counts, steps)
        fit(model, rows, [])
        found[way] = read(model, rows, held)
    learned = model.state_dict()
    for way in STAGES:
        seed_everything(seed, verbose=False)
        model = Classifier(way, counts, max(steps // 10, 1))
        model.load_state_dict(learned)
        model.body.requires_grad_(False)
        fit(model, rows, [MaxNorm(layers=["head"])])
        found[way] = read(model, rows, held)
    return found


def main(steps: int = 3000, seeds: int = 3) -> None:
    """Train all and print a table for each imbalance."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for ratio in RATIOS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on loaders
            found = [classify(ratio, seed, steps) for seed in range(seeds)]
        runs = {way: [one[way] for one in found] for way in found[0]}
        print(table(f"1:{ratio}", runs), end="\n\n", flush=True)
    rare = {way: median(of, "minority accuracy") for way, of in runs.items()}
    best = max(rare, key=lambda way: rare[way])
    print(f"After {steps} steps at 1:{RATIOS[-1]} rare digits are told at {rare[best]:.2f} ({best}),"
          f" {rare['cross-entropy']:.2f} with plain cross-entropy.")  # fmt: skip


if __name__ == "__main__":
    main(*((5, 1) if is_quick(__doc__) else ()))
