"""Handwritten digits as a sequence of tasks, a small classifier, and what a callback keeps: what the scripts share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

TRAIN, WIDTH = 600, 128
Task = tuple[TensorDataset, TensorDataset]


class Classifier(LightningModule):
    """Two layers, SGD with momentum."""

    def __init__(self, classes: int, optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same for every method, but where the method is an optimizer."""
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """All images in a random order, and their labels."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return images[order].float() / 16, labels[order]


def permuted(seed: int, count: int = 3) -> list[Task]:
    """The same ten digits under ``count`` permutations of the pixels; 600 images to train on, the others held out."""
    images, labels = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        rows = images[:, torch.randperm(64, generator=generator)]
        tasks.append((TensorDataset(rows[:TRAIN], labels[:TRAIN]), TensorDataset(rows[TRAIN:], labels[TRAIN:])))
    return tasks


def split(seed: int) -> list[Task]:
    """Odd or even? First of 0 and 1, then of 2 and 3, and so on: one head, nothing says which task it is."""
    images, labels = digits(seed)
    tasks = []
    for first in range(0, 10, 2):
        own = (labels // 2 == first // 2).nonzero().flatten()
        train, test = own[: TRAIN // 5 * 2], own[TRAIN // 5 * 2 :]
        tasks.append((TensorDataset(images[train], labels[train] % 2), TensorDataset(images[test], labels[test] % 2)))
    return tasks


def quiet_trainer(**arguments: Any) -> Trainer:
    """One that writes nothing."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def bytes_kept(state: Any) -> int:
    """Of the tensors in a state, however it nests them."""
    if isinstance(state, Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(bytes_kept(part) for part in parts)
