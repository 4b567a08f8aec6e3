"""Tasks of a few numbers: a classifier with dropout and batch normalization, and what it learns one after the other."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse.callbacks.continual.task_aware import TaskAware

CLASSES, WIDTH = 3, 6


class Learner(LightningModule):
    """Six numbers in, three classes out."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(WIDTH, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2))
            self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def task(seed: int, n: int = 48) -> TensorDataset:
    """Classes around other means for every seed."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(CLASSES, WIDTH, generator=generator)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return TensorDataset(means[y] + torch.randn(n, WIDTH, generator=generator), y)


def training(seed: int) -> DataLoader:
    """Six batches, shuffled by the global generator."""
    return DataLoader(task(seed), batch_size=8, shuffle=True)


def ordered(seed: int) -> DataLoader:
    """The same batches in the same order every time."""
    return DataLoader(task(seed), batch_size=8)


def steady(seed: int = 0) -> Learner:
    """One that draws no random numbers in training."""
    learner = Learner(seed)
    learner.body[3] = nn.Identity()
    return learner


def held_out(seed: int) -> DataLoader:
    """Uneven batches of the same task."""
    return DataLoader(task(seed), batch_size=20)


def accuracy(model: nn.Module, seed: int) -> float:
    """Share of a task that a model has right."""
    x, y = task(seed).tensors
    flags = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        right = (model.eval()(x).argmax(dim=1) == y).float().mean().item()
    for module, flag in flags:
        module.training = flag
    return right


class Counting(TaskAware):
    """Remembers at which steps tasks ended, and on which batches."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[list[float]] = []

    def end_task(self, trainer: Any, pl_module: LightningModule) -> None:
        first = next(iter(trainer.train_dataloader.dataset))[0]
        self.ends.append([trainer.global_step, float(first.sum())])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ends": [list(end) for end in self.ends]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.ends = [list(end) for end in state_dict["ends"]]
