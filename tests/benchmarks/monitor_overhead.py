"""Share of the training time that monitors take at their defaults, point, logging and pictures included.

One fit in which blocks of 50 steps with the monitor (one point each) alternate with blocks without it; the ratio is
that of each watched block to the mean of its two neighbours, in processor time on one thread. Where a block takes
seconds its noise hides a point of milliseconds, so the time inside the monitor's own callbacks is printed as well.

``CollapseMonitor`` on random batches; on scikit-learn's digits (64-256x4-10, or one output where the target is the
digit as a number) the monitors of neural collapse, of regression collapse and of the intrinsic dimension.

Run: ``python -m tests.benchmarks.monitor_overhead [mlp|transformer|nc|nrc|id]``. Budgets: 4 %, 1 % and 4 %.
"""

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import cycle, pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_collapse import (
    CollapseMonitor,
    IntrinsicDimensionMonitor,
    Monitor,
    NeuralCollapseMonitor,
    RegressionCollapseMonitor,
)
from lightning_collapse.utilities.trainer import logging_step

BLOCK = 50  # the trainer's default `log_every_n_steps`


class Endless(IterableDataset[Any]):
    """The same batches for ever: an epoch that ends would cost the block it ends in."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return cycle(self.batches)


class EveryOtherBlock(Monitor):
    """A monitor that is silent in every other block and times itself; goes before the class of one."""

    spent = 0.0

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
    """Four hidden layers of 256, with cross entropy; with one output the squared error."""

    def __init__(self, inputs: int = 784, outputs: int = 10) -> None:
        super().__init__()
        sizes = [inputs, 256, 256, 256, 256]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(256, outputs))
        self.loss = nn.functional.mse_loss if outputs == 1 else nn.functional.cross_entropy

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)

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


def digits(regression: bool = False) -> Endless:
    """Whole batches of 128 of scikit-learn's digits."""
    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    targets = labels.unsqueeze(1).float() if regression else labels
    return Endless(*zip(images.split(128)[:-1], targets.split(128)[:-1], strict=True))


def setting(kind: str) -> tuple[LightningModule, Endless, type[Monitor]]:
    """What to fit, on what, watched by what."""
    if kind == "mlp":
        return MLP(), Endless((torch.randn(128, 784), torch.randint(10, (128,)))), CollapseMonitor
    if kind == "transformer":
        return Transformer(), Endless((torch.randint(100, (128, 16)), torch.randint(100, (128, 16)))), CollapseMonitor
    if kind == "nrc":
        return MLP(64, 1), digits(regression=True), RegressionCollapseMonitor
    return MLP(64), digits(), {"nc": NeuralCollapseMonitor, "id": IntrinsicDimensionMonitor}[kind]


def blocks(kind: str, points: int, folder: str) -> tuple[list[float], float, str]:
    """Processor seconds of the blocks, unwatched and watched in turn; per point inside the monitor; its name."""
    torch.manual_seed(0)
    model, data, watch = setting(kind)
    clock, monitor = Clock(), type(watch.__name__, (EveryOtherBlock, watch), {})()
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
    trainer.fit(model, DataLoader(data, batch_size=None))
    seconds = [end - start for start, end in pairwise(clock.marks)]
    return seconds[2:], monitor.spent / (points + 1), watch.__name__  # the first two blocks, with one point, warm up


def main(kind: str, points: int) -> None:
    """Print the mean and the median ratio: pictures are drawn at every tenth point, so the mean is what counts."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, spent, watch = blocks(kind, points, folder)
    watched = [2 * seconds[i] / (seconds[i - 1] + seconds[i + 1]) for i in range(1, len(seconds) - 1, 2)]
    control = [2 * seconds[i] / (seconds[i - 2] + seconds[i + 2]) for i in range(2, len(seconds) - 2, 2)]
    share = spent / statistics.median(seconds[::2])
    title = f"{watch}() on {kind if kind in ('mlp', 'transformer') else 'digits'}"
    print(f"{title}: {1000 * spent:.1f} ms per point in its callbacks, {100 * share:.2f} % of a block")
    for name, ratios in ((title, watched), ("control: unwatched blocks", control)):
        mean, median, error = statistics.mean(ratios), statistics.median(ratios), statistics.stdev(ratios)
        print(
            f"{name}: mean {mean:.4f} +- {error / len(ratios) ** 0.5:.4f}, median {median:.4f} ({len(ratios)} blocks)"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, points in (("mlp", 40), ("nc", 40), ("nrc", 40), ("id", 40), ("transformer", 4)):
        if len(sys.argv) < 2 or sys.argv[1] == name:
            main(name, points)
