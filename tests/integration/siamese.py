"""A toy that collapses unless something holds its views apart, and a fit that keeps what was logged."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_collapse.losses import VICReg
from lightning_collapse.mixins.anti_collapse import AntiCollapseMixin


class Memory(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append((step or 0, dict(metrics)))


class Siamese(LightningModule):
    """Pulls neighbours together, and nothing holds them apart."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.projector = nn.Linear(16, 8)
        self.lr = lr

    def views(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.projector(self.encoder(batch)), self.projector(self.encoder(batch.roll(1, 0)))

    def training_step(self, batch: Tensor) -> Any:
        first, second = self.views(batch)
        return (first - second).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class MixedSiamese(AntiCollapseMixin, Siamese):
    """The same through the other door."""

    def __init__(self, **regularizers: Any) -> None:
        super().__init__()
        self.set_regularizers(regularizers or {"vicreg": VICReg()})

    def training_step(self, batch: Tensor) -> Any:
        first, second = self.views(batch)
        return (first - second).square().mean() + self.anti_collapse_loss(first, second)


class Single(Siamese):
    """Pulls everything to the origin, in one call of each layer: for losses of one view."""

    def training_step(self, batch: Tensor) -> Any:
        return self.projector(self.encoder(batch)).square().mean()


class MixedSingle(MixedSiamese):
    """That one through the other door."""

    def training_step(self, batch: Tensor) -> Any:
        features = self.projector(self.encoder(batch))
        return features.square().mean() + self.anti_collapse_loss(features)


def fit(
    make: Callable[[], LightningModule],
    *callbacks: Any,
    batches: int = 4,
    batch_size: int = 16,
    extra: int = 0,
    ckpt_path: Any = None,
    **kwargs: Any,
) -> tuple[LightningModule, Memory, Trainer]:
    """Train on noise, in ``batches`` batches and, if ``extra``, a last smaller one."""
    seed_everything(0, verbose=False)
    data = torch.randn(batches * batch_size + extra, 16)
    model = make()
    logger = Memory()
    kwargs = {"max_epochs": 1, "log_every_n_steps": 1, "accelerator": "cpu"} | kwargs
    trainer = Trainer(
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(model, DataLoader(data, batch_size=batch_size), ckpt_path=ckpt_path)
    return model, logger, trainer


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def curve(logger: Memory, key: str) -> list[tuple[int, float]]:
    return [(step, row[key]) for step, row in logger.rows if key in row]
