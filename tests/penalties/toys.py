"""A classifier and tasks for it."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.penalties.references import task
from tests.toys import fit


class Classifier(LightningModule):
    """6 -> 8 -> 3, with momentum or Adam."""

    def __init__(self, optimizer: str = "sgd", classes: int = 3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, classes)
        self.optimizer = optimizer

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=0.02)
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class Manual(Classifier):
    """Two optimizers, stepped by hand."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.2, momentum=0.9) for part in (self.encoder, self.head)]


def loader(index: int, batch_size: int = 8, n: int = 48) -> DataLoader:
    """The batches of a task, in a fixed order."""
    return DataLoader(TensorDataset(*task(index, n, torch.float32)), batch_size)


def fit_tasks(model: LightningModule, callbacks: Any = (), tasks: int = 2, batch_size: int = 8, **kwargs: Any) -> Any:
    """One trainer after the other; returns the last."""
    for index in range(tasks):
        trainer = fit(model, callbacks, loader(index, batch_size), log_every_n_steps=1, **kwargs)
    return trainer


def flat(model: nn.Module) -> torch.Tensor:
    """All weights, copied."""
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
