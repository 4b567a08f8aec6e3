"""Share of training time that ``WeightSpectrumMonitor()`` takes at its defaults.

The transformer of ``monitor_overhead``, four layers of width 128 on 128 sequences of 16 tokens. A fit of it takes
minutes between two points at the default cadence, so the cost of a point is measured at a cadence of 10, in the
processor time of the monitor's own callbacks, and related to as many steps as the default cadence has.

Run: ``python -m tests.benchmarks.weight_spectrum``.
"""

import logging
import statistics
import time
import warnings
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_collapse import WeightSpectrumMonitor
from lightning_collapse.utilities.points import Point
from tests.benchmarks.models import Endless, Transformer

EVERY = 10


class Clock(Callback):
    """Processor time at the start of every step; listed first, so that a step ends after its point."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.marks.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in pairwise(self.marks)]


class Timed(WeightSpectrumMonitor):
    """Times itself; decides on a cadence and then keeps another."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: list[float] = []
        self.watched = 0

    def cadence(self, trainer: Trainer) -> int:
        return EVERY

    @property
    def decided(self) -> int:
        return self._multiple

    def measure(self, *args: Any) -> list[Point]:
        self.watched = len(self._matrices)
        return super().measure(*args)

    def on_train_batch_start(self, *args: Any) -> None:
        start = time.process_time()
        super().on_train_batch_start(*args)
        self.spent.append(time.process_time() - start)

    def on_before_optimizer_step(self, *args: Any) -> None:
        start = time.process_time()
        super().on_before_optimizer_step(*args)
        self.spent[-1] += time.process_time() - start

    def on_train_batch_end(self, *args: Any) -> None:
        start = time.process_time()
        super().on_train_batch_end(*args)
        self.spent[-1] += time.process_time() - start


def fit(callbacks: list[Callback], steps: int) -> None:
    """Train the transformer for so many steps."""
    torch.manual_seed(0)
    batch = (torch.randint(100, (128, 16)), torch.randint(100, (128, 16)))
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Transformer(), DataLoader(Endless(batch), batch_size=None))


def spectra(points: int) -> None:
    """Cost of points of ``WeightSpectrumMonitor`` and of the steps between two of them."""
    clock, monitor = Clock(), Timed()
    fit([clock, monitor], EVERY * (points + 1) + 1)
    at_points = monitor.spent[EVERY - 1 :: EVERY]
    step = statistics.median(s for i, s in enumerate(clock.seconds) if (i + 1) % EVERY)
    cadence = 50 * monitor.decided
    shares = [100 * point / (step * cadence) for point in at_points[1:]]  # the first computes nulls
    print(
        f"WeightSpectrumMonitor(): {1000 * statistics.median(at_points[1:]):.0f} ms per point of"
        f" {monitor.watched} matrices (first {1000 * at_points[0]:.0f} ms),"
        f" {1000 * step:.0f} ms per step, a point every {cadence} steps:"
        f" {statistics.mean(shares):.2f} % +- {statistics.stdev(shares):.2f} ({len(shares)} points)"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    spectra(6)
