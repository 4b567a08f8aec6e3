"""Does a learner that risks its own learning rate adapt faster? Handwritten digits whose labels are swapped.

Every ten images may move the rate by a tenth of its first value: up if the label is five or more, else down. The
homeostatic learner takes the move if, by the label that it guesses, the step it is about to make would get more of the
last twenty images right (Man, Damasio & Neven, 2022, https://arxiv.org/abs/2205.08645, as released); a coin takes it
half of the time. Beside them are fixed rates: the first value, what the homeostatic learner had on average, and ten
times the first.

Run: ``python examples/dynamics/homeostatic_learner.py`` (ten minutes on one core; with ``--quick`` a few batches each).
"""

import argparse
import logging
import math
import statistics
import warnings
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

FIRST, FLOOR, CEILING = 0.02, 1e-8, 2.0
"""Rates. The authors' first is 0.001, for forty times as many images; they have no ceiling."""
RECENT, BATCH = 20, 10
SWAPS = (0, 1, 5)
"""Pairs of labels that change places in each epoch."""
LEARNERS = ("fixed", "coin", "homeostatic", "fixed at its mean", "fixed, ten times")


class Reading(NamedTuple):
    """Of one run: the share of images that were classified rightly before they were learned from, and the rate."""

    accuracy: float
    mean_rate: float


class Learner(LightningModule):
    """Two hidden layers with ELU, plain SGD, and a rate that a policy moves."""

    def __init__(self, policy: str, rate: float, swaps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy, self.rate, self.swaps = policy, rate, swaps
        layers = [nn.Linear(64, 80), nn.ELU(), nn.Linear(80, 60), nn.ELU(), nn.Linear(60, 10)]
        self.net = nn.Sequential(*layers)
        self.labels = torch.arange(10)  # what each digit is called now
        self.random = torch.Generator().manual_seed(int(torch.initial_seed()))
        self.recent: tuple[Tensor, Tensor] | None = None
        self.rates: list[float] = []
        self.right: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Guess, perhaps move the rate, and learn."""
        images, labels = batch[0], self.labels[batch[1]]
        logits = self.net(images)
        guesses = logits.argmax(dim=1)
        self.right.append((guesses == labels).double().mean())
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(logits, labels))
        if self.recent is not None and self._takes(int(guesses[0])):
            self.rate = self._moved(int(labels[0]))
        for group in optimizer.param_groups:
            group["lr"] = self.rate
        optimizer.step()
        self.rates.append(self.rate)
        self.log("log rate", math.log(self.rate))
        past = self.recent or (images, batch[1])
        both = zip(past, (images, batch[1]), strict=True)
        self.recent = tuple(torch.cat([a, b])[-RECENT:] for a, b in both)  # type: ignore[assignment]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Swap two labels, as often in each epoch as asked."""
        batches = int(self.trainer.num_training_batches)
        if self.swaps and (batch_idx + 1) % max(1, batches // self.swaps) == 0:
            pair = torch.randperm(10, generator=self.random)[:2]
            self.labels[pair] = self.labels[pair.flip(0)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def _moved(self, label: int) -> float:
        return min(max(self.rate + (FIRST if label >= 5 else -FIRST) / 10, FLOOR), CEILING)

    def _takes(self, guess: int) -> bool:
        """Whether the rate is moved: by which way it would go if the guess were right, by a coin, or never."""
        if self.policy == "coin":
            return bool(torch.rand((), generator=self.random) > 0.5)
        return self.policy == "homeostatic" and self._recalled(self._moved(guess)) > self._recalled(self.rate)

    @torch.no_grad()
    def _recalled(self, rate: float) -> int:
        """How many recent images a step at this rate would get right."""
        assert self.recent is not None
        images, digits = self.recent
        weights = {n: p if p.grad is None else p - rate * p.grad for n, p in self.net.named_parameters()}
        return int((functional_call(self.net, weights, (images,)).argmax(dim=1) == self.labels[digits]).sum())


def learn(policy: str, swaps: int, seed: int, length: tuple[int, int], rate: float = FIRST) -> Reading:
    """Train once, for so many epochs of so many batches."""
    seed_everything(seed, verbose=False)
    images, digits = (torch.tensor(part) for part in load_digits(return_X_y=True))
    model = Learner(policy, rate, swaps)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=length[0],
        limit_train_batches=length[1],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = TensorDataset(images.float() / 16, digits)
    trainer.fit(model, DataLoader(rows, batch_size=BATCH, shuffle=True, drop_last=True))
    return Reading(torch.stack(model.right).mean().item(), statistics.fmean(model.rates))


def table(runs: dict[tuple[str, int], list[Reading]]) -> str:
    """Per learner and number of swaps the median over seeds and the range, in Markdown."""
    head = [name for swaps in SWAPS for name in (f"accuracy, {swaps} swaps", "mean rate")]
    lines = [f"| learner | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for learner in LEARNERS:
        of_each = [runs[learner, swaps] for swaps in SWAPS]
        cells = [cell for some in of_each for cell in (_said(some, "accuracy"), _said(some, "mean_rate"))]
        lines.append(f"| {learner} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(some: list[Reading], field: str) -> str:
    values = [getattr(reading, field) for reading in some]
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main(epochs: int = 20, seeds: int = 3, batches: int = 179) -> None:
    """Train all and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    runs: dict[tuple[str, int], list[Reading]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        for swaps in SWAPS:
            for learner in LEARNERS[:3]:
                runs[learner, swaps] = [learn(learner, swaps, seed, (epochs, batches)) for seed in range(seeds)]
            rates = [reading.mean_rate for reading in runs["homeostatic", swaps]]
            for learner, fixed in ((LEARNERS[3], rates), (LEARNERS[4], [10 * FIRST] * seeds)):
                alike = [learn("fixed", swaps, seed, (epochs, batches), rate) for seed, rate in enumerate(fixed)]
                runs[learner, swaps] = alike
    print(table(runs))
    ends = {learner: statistics.median(r.accuracy for r in runs[learner, SWAPS[-1]]) for learner in LEARNERS}
    said = ", ".join(f"{accuracy:.3f} ({learner})" for learner, accuracy in ends.items())
    print(f"\nAfter {epochs * batches} steps with {SWAPS[-1]} swaps in each epoch, right before learning: {said}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 15 batches: to see that it runs")
    main(*((1, 1, 15) if parser.parse_args().quick else ()))
