"""Can one see, while a network has only memorized, that it will generalize? Modular addition, with and without decay.

Run: ``python examples/dynamics/grokking.py`` (half a minute on one core; ``--quick``: one short run each).
"""

import argparse
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_collapse.functional.feature_learning import (
    emergence_cosine,
    relative_weight_change,
    representation_alignment,
)

BASE, WIDTH, SHARE, RATE, PROBE = 31, 256, 0.5, 2e-3, 128
READ = (0, 100, 200, 400, 800, 1600)


class Reading(NamedTuple):
    """Of one moment."""

    step: int
    train: float  # accuracy
    test: float
    error: float  # of the test, squared
    cosine: float
    change: float
    alignment: float


def run(decay: float, seed: int, steps: int, every: int) -> list[Reading]:
    """Train quadratic units on half of all sums with squared errors; reading costs more than training."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.tensor(list(product(range(BASE), repeat=2)))
    x, labels = one_hot(pairs, BASE).float().flatten(1), pairs.sum(dim=1) % BASE
    order = torch.randperm(len(x), generator=generator)
    train, test = order[: int(SHARE * len(x))], order[int(SHARE * len(x)) :]
    targets = one_hot(labels, BASE).float()
    first = (torch.randn(2 * BASE, WIDTH, generator=generator) / (2 * BASE) ** 0.5).requires_grad_()
    head = (torch.randn(WIDTH, BASE, generator=generator) / WIDTH**0.5).requires_grad_()
    start = first.detach().clone()
    optimizer = torch.optim.AdamW([first, head], lr=RATE, weight_decay=decay, betas=(0.9, 0.98))

    def units(rows: Tensor, weight: Tensor = first) -> Tensor:
        return (x[rows] @ weight).square()

    readings = []
    for step in range(steps + 1):
        hidden = units(train)
        outputs = hidden @ head
        if step % every == 0:
            with torch.no_grad():
                other = units(test) @ head
                right = [
                    (o.argmax(dim=1) == labels[rows]).float().mean().item()
                    for o, rows in ((outputs, train), (other, test))
                ]
                alignment = representation_alignment(units(train[:PROBE]), units(train[:PROBE], start)).debiased
                error = (other - targets[test]).square().sum(dim=1).mean()
                facts = error, emergence_cosine(hidden, targets[train])
                change = relative_weight_change(first, start)
            readings.append(Reading(step, *right, *(fact.item() for fact in (*facts, change, alignment))))
        optimizer.zero_grad()
        (outputs - targets[train]).square().sum(dim=1).mean().backward()
        optimizer.step()
    return readings


def first_step(readings: list[Reading], name: str, least: float) -> str:
    """When an accuracy has come that far."""
    return next((str(r.step) for r in readings if getattr(r, name) >= least), "never")


def spread(values: list[float]) -> str:
    """Median and range."""
    values = sorted(values)
    return f"{values[len(values) // 2]:.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def main(steps: int = 1600, every: int = 50, seeds: int = 3) -> None:
    """Train all and print both tables."""
    runs = {decay: [run(decay, seed, steps, every) for seed in range(seeds)] for decay in (1.0, 0.0)}
    head = "| decay | step | train accuracy | test accuracy | alignment | weight change | cosine |"
    print(head + "\n" + "|---" * 7 + "|")
    for decay, found in runs.items():
        for moment in zip(*found, strict=True):
            if moment[0].step in READ:
                names = ("train", "test", "alignment", "change", "cosine")
                cells = [spread([getattr(reading, name) for reading in moment]) for name in names]
                print(f"| {decay:g} | {moment[0].step} | " + " | ".join(cells) + " |")
    print("\n| decay | seed | memorized at | test error highest at | half of the test at | 95 % at |")
    print("|---" * 6 + "|")
    for decay, found in runs.items():
        for seed, readings in enumerate(found):
            worst = max(readings, key=lambda reading: reading.error).step
            when = [first_step(readings, *what) for what in (("train", 0.99), ("test", 0.5), ("test", 0.95))]
            print(f"| {decay:g} | {seed} | {when[0]} | {worst} | {when[1]} | {when[2]} |")
    done = [sum(readings[-1].test >= 0.95 for readings in found) for found in runs.values()]
    print(f"\nAfter {steps} steps {done[0]} of {seeds} runs with decay generalize, and {done[1]} of {seeds} without.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 4 steps: to see that it runs")
    main(*((4, 2, 1) if parser.parse_args().quick else ()))
