"""What a guard costs beside the monitors that it reads: its own share of the training time, logging of its curves too.

The MLP of ``monitor_overhead`` under ``CollapseMonitor()``, ``PlasticityMonitor()`` and ``CollapseGuard()`` at their
defaults, one point per 50 steps, in processor time on one thread.

Run: ``python -m tests.benchmarks.guard_overhead``.
"""

import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, CollapseMonitor, PlasticityMonitor
from tests.benchmarks.models import MLP
from tests.benchmarks.monitor_overhead import perceptron_data, quiet

BLOCK = 50  # the trainer's default `log_every_n_steps`


class Timed(CollapseGuard):
    """A guard that times itself."""

    at_points = at_steps = 0.0

    def on_points(self, *args: Any) -> None:
        start = time.process_time()
        super().on_points(*args)
        self.at_points += time.process_time() - start

    def on_train_batch_start(self, *args: Any) -> None:
        start = time.process_time()
        super().on_train_batch_start(*args)
        self.at_steps += time.process_time() - start


def main(points: int = 40) -> None:
    """Print the milliseconds per point and the share of the whole."""
    torch.manual_seed(0)
    guard, start = Timed(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=points * BLOCK + 1,
            max_epochs=-1,
            logger=TensorBoardLogger(folder),
            callbacks=[CollapseMonitor(), PlasticityMonitor(), guard],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(MLP(), DataLoader(perceptron_data(), batch_size=None))
    total = time.process_time() - start
    print(
        f"CollapseGuard(): {1000 * guard.at_points / points:.2f} ms per {BLOCK} steps at points,"
        f" {1e6 * guard.at_steps / (points * BLOCK):.1f} us per step between,"
        f" {100 * (guard.at_points + guard.at_steps) / total:.2f} % of {total:.1f} s"
    )


if __name__ == "__main__":
    quiet()
    main()
