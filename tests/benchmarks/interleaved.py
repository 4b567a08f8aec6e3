"""Interleaved fits: a bare and a watched one take turns in one process, block by block.

Each fit has a thread of its own, and one waits while the other runs a block of optimizer steps; what else the machine
does meets both. Everything that watching brings is in the watched side: hooks that have nothing to do, points,
pictures, loggers, verdicts.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, IterableDataset

WARM_UP = 2


@dataclass
class Ratios:
    """Watched blocks over the mean of the bare blocks before and after them, and bare blocks over their neighbors.

    Attributes:
        seconds: Median of a step of the bare fit.
    """

    watched: list[float]
    control: list[float]
    seconds: float

    def __str__(self) -> str:
        texts = []
        for values in (self.watched, self.control):
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            texts.append(f"{statistics.median(values):.4f} (mean {statistics.mean(values):.4f} +- {error:.4f})")
        return f"{texts[0]}, control {texts[1]}, {len(self.watched)} blocks, {1000 * self.seconds:.2f} ms a step"


def ratios(
    model: Callable[[], LightningModule],
    data: IterableDataset[Any],
    watchers: Callable[[], Sequence[Callback]],
    block: int = 50,
    blocks: int = 20,
    device: str = "cpu",
    logs: bool = True,
) -> Ratios:
    """Fit twice at once, with TensorBoard if ``logs``; ``data`` never ends."""
    with tempfile.TemporaryDirectory() as folder:
        made = [(model, []), (model, watchers())]
        sides = [
            _Side(fit, callbacks, data, (block, WARM_UP + blocks + side), device, f"{folder}/{side}" if logs else "")
            for side, (fit, callbacks) in enumerate(made)
        ]
        for turn in range(WARM_UP + blocks + 1):
            for side in sides[: 1 if turn == WARM_UP + blocks else 2]:  # a watched block lies between two bare ones
                side.run()
        for side in sides:
            side.leave()
    bare, watched = (side.seconds[WARM_UP:] for side in sides)
    means = [(before + after) / 2 for before, after in pairwise(bare)]
    control = [2 * now / (before + after) for before, now, after in zip(bare, bare[1:], bare[2:], strict=False)]
    pairs = zip(watched, means, strict=True)
    return Ratios([each / mean for each, mean in pairs], control, statistics.median(bare) / block)


class _Side(Callback):
    """One fit, in a thread; listed first, so that a block ends after its point."""

    def __init__(
        self,
        model: Callable[[], LightningModule],
        callbacks: Sequence[Callback],
        data: IterableDataset[Any],
        size: tuple[int, int],
        device: str,
        folder: str,
    ) -> None:
        self.block, self.cuda = size[0], device == "cuda"
        self.seconds: list[float] = []
        self.error: BaseException | None = None
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._started: float | None = None
        self._left = False
        options: dict[str, Any] = {
            "accelerator": "gpu" if self.cuda else "cpu",
            "devices": 1,
            "max_epochs": -1,
            "logger": TensorBoardLogger(folder) if folder else False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        self._fit = lambda: Trainer(**options, callbacks=[self, *callbacks]).fit(
            model(), DataLoader(data, batch_size=None)
        )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def run(self) -> None:
        """Let it run one block, and wait for that."""
        if not self._thread.is_alive() and self.error is None:
            self._thread.start()
        self._go.release()
        self._done.acquire()
        if self.error is not None:
            raise self.error

    def leave(self) -> None:
        """Let it end."""
        self._left = True
        self.run()
        self._thread.join()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.block:
            return
        if self._started is not None:
            self.seconds.append(self._now() - self._started)
            self._done.release()
            self._go.acquire()
        trainer.should_stop = self._left
        self._started = self._now()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _run(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._go.acquire()
        try:
            self._fit()
        except BaseException as error:
            self.error = error
        self._done.release()
