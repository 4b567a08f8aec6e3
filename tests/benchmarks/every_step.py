"""What monitors cost that are cheap enough for every step, and what one warm power step costs beside an exact norm.

(a) Fits of a transformer (four layers of width 128) in which steps with the monitors, a point each, alternate with
steps without them; the ratio is that of each watched step to the mean of its two neighbours, in processor time on one
thread. The runs have no logger, so what loggers write is left out; ``callback_metrics`` and hooks are in. All of them
together also with larger batches: what the monitors do hardly grows with the batch, and a step does.

(b) One call of ``PowerIteration.step`` on all matrices of that transformer, interleaved with
``torch.linalg.matrix_norm(weight, 2)`` on each of them.

Run: ``python -m tests.benchmarks.every_step``.
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

from lightning_collapse import CollapseMonitor, GradientMonitor, Monitor, SpectralAlignmentMonitor
from lightning_collapse.spectral import PowerIteration
from lightning_collapse.utilities import weight_matrices
from lightning_collapse.utilities.trainer import logging_step
from tests.benchmarks.monitor_overhead import Endless, Transformer

STEPS = 60
SHAPE, LARGER = (128, 16), ((64, 64), (64, 128))
WARM_UP = 6


def every_other(cls: type[Monitor], **arguments: Any) -> Monitor:
    """A monitor with a point at every other step, and with the work that a cadence of one step would be."""

    class EveryOtherStep(cls):  # type: ignore[misc, valid-type]
        def cadence(self, trainer: Trainer) -> int:
            return logging_step(trainer) % 2

    EveryOtherStep.__qualname__ += cls.__name__  # the trainer tells callbacks apart by it
    monitor: Monitor = EveryOtherStep(every_n_steps=1, **arguments)
    return monitor


def readings() -> dict[str, list[Monitor]]:
    """The monitors that are timed, new ones."""
    alignment = every_other(SpectralAlignmentMonitor)
    gradients = every_other(GradientMonitor, noise=False)
    ratio = every_other(CollapseMonitor, measures=["participation_ratio"])
    return {
        "spectral alignment": [alignment],
        "gradient norms": [gradients],
        "participation ratio": [ratio],
        "all three": [
            every_other(SpectralAlignmentMonitor),
            every_other(GradientMonitor, noise=False),
            every_other(CollapseMonitor, measures=["participation_ratio"]),
        ],
    }


class Clock(Callback):
    """Processor time of every step; listed first, so that a step ends after its point."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.marks.append(time.process_time())


def every_step(name: str, monitors: list[Monitor], shape: tuple[int, int]) -> None:
    """Print (a) for batches of this many sequences of this many tokens."""
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2 * STEPS + WARM_UP + 2,
        max_epochs=-1,
        logger=False,
        callbacks=[clock, *monitors],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = torch.randint(100, shape), torch.randint(100, shape)
    trainer.fit(Transformer(), DataLoader(Endless(batch), batch_size=None))
    seconds = [end - start for start, end in pairwise(clock.marks)]
    odd = range(WARM_UP + 1, len(seconds) - 2, 2)
    ratios = [2 * seconds[i] / (seconds[i - 1] + seconds[i + 1]) for i in odd]
    control = [2 * seconds[i + 1] / (seconds[i - 1] + seconds[i + 3]) for i in odd if i + 3 < len(seconds)]
    tokens = f"{shape[0]} x {shape[1]} tokens"
    print(f"a step of {tokens} takes {1000 * statistics.median(seconds[i + 1] for i in odd):.0f} ms")
    report(f"{name} at every step", ratios)
    report("control: unwatched steps", control)


def power_step() -> None:
    """Print (b)."""
    weights = {matrix.name: matrix.read() for matrix in weight_matrices(Transformer())}
    power = PowerIteration()
    power.step(weights)
    ratios, steps = [], []
    for _ in range(STEPS):
        times = [time.process_time()]
        power.step(weights)
        times.append(time.process_time())
        for weight in weights.values():
            torch.linalg.matrix_norm(weight, 2)
        times.append(time.process_time())
        step, exact = (end - start for start, end in pairwise(times))
        ratios.append(step / exact)
        steps.append(1000 * step)
    print(f"one warm power step on {len(weights)} matrices takes {statistics.median(steps):.2f} ms")
    report("power step / matrix_norm(weight, 2)", ratios)


def report(name: str, ratios: list[float]) -> None:
    """Print a ratio with its spread."""
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"{name}: median {median:.4f}, quartiles {low:.4f} and {high:.4f} ({len(ratios)} pairs)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for reading, monitors in readings().items():
        every_step(reading, monitors, SHAPE)
    for shape in LARGER:
        every_step("all three", readings()["all three"], shape)
    power_step()
