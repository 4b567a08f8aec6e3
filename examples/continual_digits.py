"""What keeps a small network from forgetting? Permuted and split handwritten digits, every penalty and replay.

Run: ``python examples/continual_digits.py`` (ten minutes on one core; with ``--quick`` one short run each).
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import ContinualMetrics, Distillation, Replay, ShrinkAndPerturb, WeightPenalty, fit_tasks
from lightning_collapse.optimizers import CLASSP
from lightning_collapse.penalties import (
    EWC,
    KFACEWC,
    L2SP,
    MAS,
    L2Init,
    RankOneEWC,
    RWalk,
    SynapticIntelligence,
)
from lightning_collapse.replay import ReplayBuffer

BATCH, TRAIN, EPOCHS, WIDTH = 32, 600, 4, 128
TUNING_SEED = 100
"""The weight of each method is the best of its four on this seed; the table is of other seeds."""

Task = tuple[TensorDataset, TensorDataset]
Build = Callable[[float], Sequence[Callback]]


class Classifier(LightningModule):
    """Two layers, SGD with momentum."""

    def __init__(self, classes: int, optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same for every method, but where the method is an optimizer."""
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Method(NamedTuple):
    """A way not to forget."""

    weights: tuple[float, ...]
    callbacks: Build


def _penalty(penalty: Any, *weights: float, **arguments: Any) -> Method:
    return Method(weights, lambda weight: [WeightPenalty(penalty(weight=weight, **arguments))])


def _replay(rows: float, distill: bool) -> Sequence[Callback]:
    buffer = ReplayBuffer(size=int(rows))
    return [Replay(buffer), Distillation(replay=buffer)] if distill else [Replay(buffer)]


METHODS = {
    "nothing": Method((0.0,), lambda weight: []),
    "EWC": _penalty(EWC, 10.0, 100.0, 1000.0, 10000.0),
    "EWC, online": _penalty(EWC, 10.0, 100.0, 1000.0, 10000.0, online=True),
    "rank-1 EWC": _penalty(RankOneEWC, 0.15, 1.5, 15.0, 150.0),
    "KFAC-EWC": _penalty(KFACEWC, 1.0, 10.0, 100.0, 1000.0),
    "synaptic intelligence": _penalty(SynapticIntelligence, 0.1, 1.0, 10.0, 100.0),
    "RWalk": _penalty(RWalk, 0.1, 1.0, 10.0, 100.0),
    "MAS": _penalty(MAS, 0.001, 0.01, 0.1, 1.0),
    "L2-init": _penalty(L2Init, 1e-5, 1e-4, 1e-3, 1e-2),
    "L2-SP": _penalty(L2SP, 1e-4, 1e-3, 1e-2, 1e-1),
    "LwF": Method((0.3, 1.0, 3.0, 10.0), lambda weight: [Distillation(weight=weight)]),
    "shrink and perturb": Method((0.4, 0.6, 0.8, 0.9), lambda shrink: [ShrinkAndPerturb(shrink=shrink)]),
    "replay of 100 rows": Method((100.0,), lambda rows: _replay(rows, distill=False)),
    "and LwF on replay": Method((100.0,), lambda rows: _replay(rows, distill=True)),
    "CLASSP": Method((1e-5, 1e-4, 1e-3, 1e-2), lambda threshold: []),
}


class Score(NamedTuple):
    """What is left after the last task."""

    accuracy: float  # mean over all tasks
    backward_transfer: float
    worst_case_accuracy: float  # had training been stopped at the worst step


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """All images in a random order, and their labels."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return images[order].float() / 16, labels[order]


def permuted(seed: int, count: int = 3) -> list[Task]:
    """The same ten digits under ``count`` permutations of the pixels; 600 images to train on, the others held out."""
    images, labels = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        rows = images[:, torch.randperm(64, generator=generator)]
        tasks.append((TensorDataset(rows[:TRAIN], labels[:TRAIN]), TensorDataset(rows[TRAIN:], labels[TRAIN:])))
    return tasks


def split(seed: int) -> list[Task]:
    """Odd or even? First of 0 and 1, then of 2 and 3, and so on: one head, nothing says which task it is."""
    images, labels = digits(seed)
    tasks = []
    for first in range(0, 10, 2):
        own = (labels // 2 == first // 2).nonzero().flatten()
        train, test = own[: TRAIN // 5 * 2], own[TRAIN // 5 * 2 :]
        tasks.append((TensorDataset(images[train], labels[train] % 2), TensorDataset(images[test], labels[test] % 2)))
    return tasks


PROBLEMS: dict[str, tuple[Callable[[int], list[Task]], int]] = {"permuted": (permuted, 10), "split": (split, 2)}


def learn(problem: str, method: str, weight: float, seed: int, epochs: int) -> Score:
    """All tasks in turn, watched every five steps."""
    make, classes = PROBLEMS[problem]
    tasks = make(seed)
    metrics = ContinualMetrics([DataLoader(test, batch_size=1000) for _, test in tasks], every_n_steps=5)
    read = _fit(tasks, classes, method, weight, seed, epochs, [metrics]).callback_metrics
    return Score(*(read[f"continual/{name}"].item() for name in Score._fields))


def seconds(problem: str, method: str, weight: float, epochs: int) -> float:
    """How long all tasks take, not watched."""
    make, classes = PROBLEMS[problem]
    begin = time.perf_counter()
    _fit(make(0), classes, method, weight, 0, epochs, [])
    return time.perf_counter() - begin


def _fit(
    tasks: list[Task],
    classes: int,
    method: str,
    weight: float,
    seed: int,
    epochs: int,
    watchers: Sequence[Callback],
) -> Trainer:
    seed_everything(seed, verbose=False)
    model = Classifier(classes, partial(CLASSP, lr=0.05, threshold=weight, power=2) if method == "CLASSP" else None)
    callbacks = [*METHODS[method].callbacks(weight), *watchers]

    def make_trainer() -> Trainer:
        return Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )

    return fit_tasks(make_trainer, model, [DataLoader(train, batch_size=BATCH, shuffle=True) for train, _ in tasks])


def best_weight(problem: str, method: str, epochs: int) -> float:
    """The weight with the highest accuracy on the seed that is kept for this."""
    weights = METHODS[method].weights
    return max(weights, key=lambda weight: learn(problem, method, weight, TUNING_SEED, epochs).accuracy)


class Row(NamedTuple):
    """A method on a problem: its weight, a score per seed, and its time over that of doing nothing."""

    weight: float
    scores: list[Score]
    time: float


def table(problem: str, rows: dict[str, Row]) -> str:
    """Mean over the seeds and standard deviation, in Markdown."""
    head = ["against forgetting", "weight", "ACC", "BWT", "WC-ACC", "time"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, row in rows.items():
        cells = [_said([getattr(score, field) for score in row.scores]) for field in Score._fields]
        weight = f"{row.weight:g}" if len(METHODS[method].weights) > 1 else ""
        lines.append(f"| {' | '.join([method, weight, *cells, f'{row.time:.2f}'])} |")
    return f"**{problem} digits**\n\n" + "\n".join(lines)


def _said(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def compare(problem: str, methods: Sequence[str], epochs: int, seeds: int, tune: bool) -> dict[str, Row]:
    """Choose the weights, train on every seed, and time each method in turn with doing nothing."""
    rows = {}
    for method in methods:
        choose = tune and len(METHODS[method].weights) > 1
        weight = best_weight(problem, method, epochs) if choose else METHODS[method].weights[0]
        ratios = []
        for _ in range(seeds):
            nothing, own = seconds(problem, "nothing", 0.0, epochs), seconds(problem, method, weight, epochs)
            ratios.append(own / nothing)
        scores = [learn(problem, method, weight, seed, epochs) for seed in range(seeds)]
        rows[method] = Row(weight, scores, statistics.median(ratios))
    return rows


def main(epochs: int = EPOCHS, seeds: int = 3, methods: Sequence[str] = tuple(METHODS), tune: bool = True) -> None:
    """Compare on both problems and print the tables."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        said = []
        for problem in PROBLEMS:
            rows = compare(problem, methods, epochs, seeds, tune)
            print(f"{table(problem, rows)}\n", flush=True)
            means = {method: statistics.mean(s.accuracy for s in row.scores) for method, row in rows.items()}
            best = max(means, key=lambda method: means[method])
            said.append(f"{best} had kept the most of {problem} digits: accuracy {means[best]:.2f} over all tasks,")
            said.append(f"where doing nothing had kept {means['nothing']:.2f};")
    steps = [epochs * -(-images // BATCH) for images in (TRAIN, TRAIN // 5 * 2)]
    print(f"After {steps[0]} steps per task of permuted digits, and {steps[1]} of split ones, {' '.join(said)[:-1]}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two methods, one seed, one epoch: to see that it runs")
    main(*((1, 1, ("nothing", "L2-init"), False) if parser.parse_args().quick else ()))
