"""Small models, loggers and a short way to fit them."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse.rules import RULES

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
    "limit_val_batches": 0,
}

HEALTHY = {
    "effective_rank": 30.0,
    "eigenvalue_effective_rank": 12.0,
    "feature_std": 1.0,
    "relative_spread": 0.6,
    "direction_spread": 0.6,
}
"""Readings of a layer by `CollapseMonitor` that no rule finds fault with."""


class MemoryLogger(Logger):
    """Keeps what it is given."""

    name = "memory"
    version = 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def curve(self, key):
        return [(step, row[key]) for step, row in self.rows if key in row]


class Claims(Callback):
    """Stands in for the monitor of a family: a guard takes its curves for drawn, and the test plants the points."""

    def __init__(self, family="collapse", curves=None):
        self.family = family
        rules = [rule for rule in RULES.values() if rule.family == family]
        self.curves = curves or [name for rule in rules for name in rule.measures]


class PointKeeper(Callback):
    """Reads points, as a user's own callback would."""

    def __init__(self):
        self.points = []

    def on_points(self, trainer, pl_module, points):
        self.points += points

    def curve(self, key):
        return [point for point in self.points if point.key == key]


class Toy(LightningModule):
    """An encoder of 16 -> 32 -> 8 features and a head."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 2)
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise ValueError("boom")
        return self.head(self.encoder(batch)).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        return self.head(self.encoder(batch))

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class ManualToy(Toy):
    """The same, optimized by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def batches(n=6, size=32, width=16, seed=1):
    """A loader of ``n`` batches in a fixed order."""
    data = torch.randn(n * size, width, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, batch_size=size)


def fit(model, callbacks=(), loader=None, **kwargs):
    """Fit and return the trainer; ``trainer.logger`` keeps the rows."""
    trainer = Trainer(**{**QUIET, "logger": MemoryLogger(), "callbacks": list(callbacks), **kwargs})
    trainer.fit(model, loader if loader is not None else batches())
    return trainer


def weights(model):
    """All parameters and buffers, copied."""
    return {name: value.clone() for name, value in model.state_dict().items()}
