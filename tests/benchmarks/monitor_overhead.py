"""Share of the training time that ``CollapseMonitor()`` takes at its defaults, point, logging and pictures included.

One fit in which blocks of 50 steps with the monitor (one point each) alternate with blocks without it; the ratio is
that of each watched block to the mean of its two neighbours, in processor time on one thread. Where a block takes
seconds its noise hides a point of milliseconds, so the time inside the monitor's own callbacks is printed as well.

Run: ``python -m tests.benchmarks.monitor_overhead [mlp|transformer]``.
"""

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise, repeat
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_collapse import CollapseMonitor
from lightning_collapse.utilities.trainer import logging_step

BLOCK = 50  # the trainer's default `log_every_n_steps`


class Endless(IterableDataset[Any]):
    """One batch for ever: an epoch that ends would cost the block it ends in."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return repeat(self.batch)


class EveryOtherBlock(CollapseMonitor):
    """The monitor at its defaults, silent in every other block; it times itself."""

    def __init__(self) -> None:
        super().__init__()
        self.spent = 0.0

    def cadence(self, trainer: Trainer) -> int:
        return BLOCK if logging_step(trainer) // BLOCK % 2 else 0

    def on_train_batch_start(self, *args: Any) -> None:
        start = time.process_time()
        super().on_train_batch_start(*args)
        self.spent += time.process_time() - start

    def on_train_batch_end(self, *args: Any) -> None:
        start = time.process_time()
        super().on_train_batch_end(*args)
        self.spent += time.process_time() - start


class Clock(Callback):
    """Processor time of every block; listed first, so that a block ends after its point."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % BLOCK == 0:
            self.marks.append(time.process_time())


class MLP(LightningModule):
    """784-256x4-10."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [784, 256, 256, 256, 256]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(256, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Transformer(LightningModule):
    """Four layers of width 128 on 128 sequences of 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 128)
        block = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 100)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.encoder(self.embed(x))).flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def blocks(kind: str, points: int, folder: str) -> tuple[list[float], float]:
    """Processor seconds of the blocks, unwatched and watched in turn; and per point inside the monitor's callbacks."""
    torch.manual_seed(0)
    if kind == "mlp":
        model, batch = MLP(), (torch.randn(128, 784), torch.randint(10, (128,)))
    else:
        model, batch = Transformer(), (torch.randint(100, (128, 16)), torch.randint(100, (128, 16)))
    clock, monitor = Clock(), EveryOtherBlock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=(2 * points + 3) * BLOCK + 1,
        max_epochs=-1,
        logger=TensorBoardLogger(folder),
        callbacks=[clock, monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(Endless(batch), batch_size=None))
    seconds = [end - start for start, end in pairwise(clock.marks)]
    return seconds[2:], monitor.spent / (points + 1)  # the first two blocks, with one point, warm up


def main(kind: str, points: int) -> None:
    """Print the mean and the median ratio: pictures are drawn at every tenth point, so the mean is what counts."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, spent = blocks(kind, points, folder)
    watched = [2 * seconds[i] / (seconds[i - 1] + seconds[i + 1]) for i in range(1, len(seconds) - 1, 2)]
    control = [2 * seconds[i] / (seconds[i - 2] + seconds[i + 2]) for i in range(2, len(seconds) - 2, 2)]
    share = spent / statistics.median(seconds[::2])
    print(
        f"CollapseMonitor() on {kind}: {1000 * spent:.1f} ms per point in its callbacks, {100 * share:.2f} % of a block"
    )
    for name, ratios in ((f"CollapseMonitor() on {kind}", watched), ("control: unwatched blocks", control)):
        mean, median, error = statistics.mean(ratios), statistics.median(ratios), statistics.stdev(ratios)
        print(
            f"{name}: mean {mean:.4f} +- {error / len(ratios) ** 0.5:.4f}, median {median:.4f} ({len(ratios)} blocks)"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, points in (("mlp", 40), ("transformer", 4)):
        if len(sys.argv) < 2 or sys.argv[1] == name:
            main(name, points)
