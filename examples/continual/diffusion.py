"""Does a Fisher information of rank one keep what a diffusion model has learned? Digits, two classes at a time.

Run: ``python examples/continual/diffusion.py`` (five minutes on one core; with ``--quick`` one short run each).
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from sklearn.linear_model import LogisticRegression
from small_diffusion import (
    CLASSES,
    SIGNAL,
    STEPS,
    Batch,
    Denoiser,
    coherence,
    fixed_batches,
    generate,
    noised,
    training_batches,
)
from small_tasks import digits, quiet_trainer
from torch import Tensor, nn

from lightning_collapse import ContinualMetrics, Distillation, WeightPenalty, fit_tasks
from lightning_collapse.penalties import EWC, Penalty, RankOneEWC

SEEDS, TUNING_SEED, TRAIN, UPDATES, BINS, POOL = 3, 100, 1300, 200, 8, 512
Data = tuple[Tensor, Tensor]


class Method(NamedTuple):
    """A penalty or none, with or without distillation."""

    penalty: Callable[[float], Penalty] | None
    weights: Sequence[float]
    distilled: bool


def _diagonal(weight: float) -> Penalty:
    return EWC(weight, "empirical", likelihood="gaussian", n_samples=None)


def _rank_one(weight: float) -> Penalty:
    return RankOneEWC(weight, likelihood="gaussian")


DIAGONAL, RANK_ONE = (1.0, 10.0, 100.0, 1000.0), (1.0, 10.0, 100.0, 1000.0)
METHODS = {
    "nothing": Method(None, (0.0,), False),
    "EWC": Method(_diagonal, DIAGONAL, False),
    "rank-1 EWC": Method(_rank_one, RANK_ONE, False),
    "distillation": Method(None, (0.0,), True),
    "EWC and distillation": Method(_diagonal, DIAGONAL, True),
    "rank-1 EWC and distillation": Method(_rank_one, RANK_ONE, True),
}


class Generated:
    """Old classes as the teacher draws them, at random steps: once for every teacher."""

    def __init__(self, per_task: int = 2) -> None:
        self.per_task, self.tasks = per_task, 0
        self._teacher: nn.Module | None = None
        self._pool: Data | None = None

    def __call__(self, teacher: nn.Module, count: int) -> Batch:
        """Some of them."""
        if teacher is not self._teacher or self._pool is None:
            labels = torch.randint(self.per_task * self.tasks, (POOL,))
            self._teacher, self._pool = teacher, (generate(teacher, labels), labels)
        rows = torch.randint(POOL, (count,))
        return noised(self._pool[0][rows], self._pool[1][rows])


class Score(NamedTuple):
    """After the last task."""

    loss: float  # held-out, mean over all tasks; half a squared distance, of 64 pixels
    forgetting: float  # by how much that of old tasks has risen
    right: float  # share of generated digits that a linear classifier takes for those that were asked for


def tasks_of(seed: int) -> tuple[list[Data], list[Data]]:
    """Training and held-out images of 0 and 1, of 2 and 3, and so on, from -1 to 1."""
    images, labels = digits(seed)
    images, parts = 2 * images - 1, []
    for images_of, labels_of in ((images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])):
        of = [labels_of // 2 == pair for pair in range(CLASSES // 2)]
        parts.append([(images_of[own], labels_of[own]) for own in of])
    return parts[0], parts[1]


def learn(method: Method, weight: float, seed: int, updates: int) -> tuple[Score, list[tuple[float, float]]]:
    """All tasks in turn; and with nothing the coherence after the first, from the most signal to the least."""
    seed_everything(seed, verbose=False)
    model, (train, test) = Denoiser(), tasks_of(seed)
    reading = [fixed_batches(*data, seed=seed) for data in train]
    metrics = ContinualMetrics(
        [fixed_batches(*data, seed=seed + 1) for data in test], metric=_error, mode="min", forward_transfer=False
    )
    old, task, curve = Generated(), [0], list[tuple[float, float]]()
    callbacks: list[Callback] = [metrics]
    if method.penalty is not None:
        callbacks.append(WeightPenalty(method.penalty(weight), loader=lambda: reading[task[0]]))
    if method.distilled:
        callbacks.append(Distillation(kind="squared", replay=old))

    def make_trainer(index: int) -> Trainer:
        task[0] = old.tasks = index
        if index == 1 and method is METHODS["nothing"]:  # all have learned it alike
            curve.extend(_coherences(model, train[0], seed))
        trainer: Trainer = quiet_trainer(max_epochs=1, callbacks=list(callbacks))
        return trainer

    trainer = fit_tasks(make_trainer, model, [training_batches(*data, updates) for data in train])
    read = trainer.callback_metrics
    loss, transfer = (read[f"continual/{name}"].item() for name in ("accuracy", "backward_transfer"))
    return Score(loss, -transfer, _right(model, train, test)), curve


def _error(outputs: Tensor, noise: Tensor) -> Tensor:
    return (outputs - noise).square().sum(dim=1) / 2


def _coherences(model: Denoiser, data: Data, seed: int) -> list[tuple[float, float]]:
    edges = [part * STEPS // BINS for part in range(BINS + 1)]
    generator = torch.Generator().manual_seed(seed)
    spans = list(pairwise(edges))
    return [coherence(model, noised(*data, between=span, generator=generator)) for span in spans]


def _right(model: Denoiser, train: list[Data], test: list[Data]) -> float:
    """Of fifty generated digits of each class."""
    images, labels = (torch.cat(part) for part in zip(*train, *test, strict=True))
    judge = LogisticRegression(max_iter=1000).fit(images, labels)
    asked = torch.arange(CLASSES).repeat_interleave(50)
    return float((judge.predict(generate(model, asked)) == asked.numpy()).mean())


def best_weight(method: Method, updates: int) -> float:
    """The one that leaves the least loss on the seed that is kept for this."""
    if len(method.weights) == 1:
        return method.weights[0]
    losses = {weight: learn(method, weight, TUNING_SEED, updates)[0].loss for weight in method.weights}
    return min(losses, key=lambda weight: losses[weight] if losses[weight] == losses[weight] else torch.inf)


def main(names: Sequence[str], updates: int, seeds: int, tune: bool) -> None:
    """Compare and print the tables."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    forgotten = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        print("| against forgetting | weight | loss | forgetting | right digit |\n" + "|---" * 5 + "|")
        for name in names:
            method = METHODS[name]
            weight = best_weight(method, updates) if tune else method.weights[0]
            runs = [learn(method, weight, seed, updates) for seed in range(seeds)]
            if name == "nothing":
                curves = [curve for _, curve in runs]
            cells = [_said([getattr(score, field) for score, _ in runs]) for field in Score._fields]
            chosen = f"{weight:g}" if len(method.weights) > 1 else ""
            print(f"| {name} | {chosen} | {' | '.join(cells)} |", flush=True)
            forgotten[name] = statistics.mean(score.forgetting for score, _ in runs)
    print("\n| steps of the diffusion | signal to noise | share of rank one | second eigenvalue |\n" + "|---" * 4 + "|")
    for part, found in enumerate(zip(*curves, strict=True)):
        start, end = part * STEPS // BINS, (part + 1) * STEPS // BINS
        ratios = [SIGNAL[step] / (1 - SIGNAL[step]) for step in (start, end - 1)]
        cells = [_said(values) for values in zip(*found, strict=True)]
        print(f"| {start} to {end - 1} | {ratios[0]:.2g} to {ratios[1]:.2g} | {' | '.join(cells)} |")
    least = min(forgotten, key=lambda name: forgotten[name])
    print(
        f"\nAfter {updates} steps per task the loss on old digits had risen least with {least}, by"
        f" {forgotten[least]:.1f}; with nothing by {forgotten['nothing']:.1f}."
    )


def _said(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3g} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.2g}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two methods, one seed, few steps: to see that it runs")
    if parser.parse_args().quick:
        main(("nothing", "rank-1 EWC and distillation"), 8, 1, tune=False)
    else:
        main(tuple(METHODS), UPDATES, SEEDS, tune=True)
