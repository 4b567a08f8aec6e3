"""Handwritten digits in two parts, a short training loop and a table: what the scripts of this folder share."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Rows(NamedTuple):
    """Images ``(N, 64)`` from 0 to 1, and which digit they show."""

    images: Tensor
    digits: Tensor

    def of(self, classes: Sequence[int]) -> "Rows":
        """Those of some digits, which are numbered anew in this order."""
        where = (self.digits.unsqueeze(1) == torch.tensor(classes)).long()
        known = where.sum(dim=1) > 0
        return Rows(self.images[known], where.argmax(dim=1)[known])


def split(seed: int) -> tuple[Rows, Rows]:
    """1347 images to train on, 450 held out; which ones is the seed's choice."""
    images, digits = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    held, kept = order[:450], order[450:]
    pixels = images.float() / 16
    return Rows(pixels[kept], digits[kept]), Rows(pixels[held], digits[held])


def train(
    model: nn.Module, loss: Callable[[Tensor, Tensor, float], Tensor], rows: Rows, steps: int, batch: int = 64
) -> Iterable[int]:
    """Train in place with SGD at 0.05, a tenth of it after a third and two thirds; yields the steps done so far.

    The loss is of images, digits and the share of training that is done.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 3, 2 * steps // 3])
    order = torch.zeros(0, dtype=torch.int64)
    yield 0
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(rows.digits))
        picked, order = order[:batch], order[batch:]
        model.train()
        optimizer.zero_grad()
        loss(rows.images[picked], rows.digits[picked], step / steps).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        yield step + 1


def said(values: Iterable[float]) -> str:
    """Median (least to largest)."""
    found = sorted(values)
    return f"{statistics.median(found):.2g} ({found[0]:.2g} to {found[-1]:.2g})"


def table(first: str, runs: dict[str, list[dict[str, float]]]) -> str:
    """In Markdown, a line for each kind of run: what its seeds read."""
    columns = list(next(iter(runs.values()))[0])
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, found in runs.items():
        lines.append(f"| {name} | {' | '.join(said(one[column] for one in found) for column in columns)} |")
    return "\n".join(lines)


def median(runs: list[dict[str, float]], column: str) -> float:
    """Over the seeds."""
    return statistics.median(one[column] for one in runs)


def is_quick(about: str | None) -> Any:
    """Whether the command line says ``--quick``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: to see that it runs")
    return parser.parse_args().quick
