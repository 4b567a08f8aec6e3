"""Share of the training time that ``CollapseMonitor()`` takes at its defaults: with and without, fit by fit in turn.

Run: ``python -m tests.benchmarks.monitor_overhead [mlp|transformer]``.
"""

import statistics
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseMonitor


class Clock(Callback):
    """Processor time of the steps, without the start of the fit; listed first, so that it also times the monitor."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:  # the first batch warms up, and the monitor learns its shapes there
            self.start = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.process_time() - self.start


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


def seconds(kind: str, monitored: bool, steps: int, folder: str) -> float:
    """Processor time of one fit."""
    torch.manual_seed(0)
    if kind == "mlp":
        model, data = MLP(), TensorDataset(torch.randn(12800, 784), torch.randint(10, (12800,)))
    else:
        model, data = Transformer(), TensorDataset(*torch.randint(100, (2, 12800, 16)))
    clock = Clock()
    callbacks: list[Callback] = [CollapseMonitor()] if monitored else []
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=TensorBoardLogger(folder),
        callbacks=[clock, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=128))
    return clock.seconds


def main(kind: str, rounds: int, steps: int) -> None:
    """Print the median of the ratios of neighbouring fits, with the spread."""
    ratios, control = [], []
    with tempfile.TemporaryDirectory() as folder:
        seconds(kind, True, 51, folder)
        for _ in range(rounds):
            plain, watched, again = (seconds(kind, monitored, steps, folder) for monitored in (False, True, False))
            ratios.append(2 * watched / (plain + again))
            control.append(again / plain)
    for name, values in ((f"CollapseMonitor() on {kind}", ratios), ("control: nothing against nothing", control)):
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name}: {middle:.4f} (min {low:.4f}, max {high:.4f}, {rounds} rounds of {steps} steps)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, rounds, steps in (("mlp", 7, 500), ("transformer", 3, 100)):
        if len(sys.argv) < 2 or sys.argv[1] == name:
            main(name, rounds, steps)
