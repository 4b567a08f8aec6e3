"""Coherence curves: how near to rank one the Fisher information of a task was, module by module."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_collapse.penalties.base import Penalty
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.trainer import logging_step


def publish_shares(trainer: Trainer, pl_module: LightningModule, penalty: Penalty) -> None:
    """Publish what the penalty has found for the task that has ended, once; in one transfer."""
    shares, penalty.rank_one_shares = penalty.rank_one_shares, {}
    if not shares:
        return
    numbers = torch.stack(list(shares.values())).tolist()  # at the end of a task
    step = logging_step(trainer)
    points = [
        Point("continual", module, "rank_one_share", step, value) for module, value in zip(shares, numbers, strict=True)
    ]
    publish(trainer, pl_module, points)


register_curve(
    "continual",
    "rank_one_share",
    reads="gradients of samples",
    range="about 0 to 1",
    collapsed="does not tell",
    source="arXiv 2509.23593",
)
