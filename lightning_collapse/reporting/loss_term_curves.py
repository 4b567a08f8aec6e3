"""Curves of what a regularizer or a penalty adds to the loss."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_collapse.reporting.publish import publish
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.trainer import is_due, logging_step


def term_curves(name: str, total: Tensor, terms: dict[str, Tensor], family: str = "regularizer") -> dict[str, Tensor]:
    """Curves of one regularizer or penalty, without graph.

    Args:
        name: Its name.
        total: What it adds to the loss, weight included; a scalar.
        terms: What else there is to draw, by name, such as its unweighted terms; scalars.
        family: First part of the names.

    Returns:
        ``{family}/{name}`` and ``{family}/{name}/{term}``.
    """
    curves = {f"{family}/{name}": total} | {f"{family}/{name}/{term}": value for term, value in terms.items()}
    return {key: value.detach() for key, value in curves.items()}


def terms_are_due(trainer: Trainer) -> bool:
    """Whether the running batch is a training batch that ends in a logging step."""
    return trainer.training and is_due(trainer, trainer.log_every_n_steps)


def publish_terms(trainer: Trainer, pl_module: LightningModule, curves: dict[str, Tensor]) -> None:
    """Publish scalars that are the same on every process; the one wait for the device of a logging step."""
    if not curves:
        return
    values = torch.stack([value.float() for value in curves.values()]).tolist()
    step = logging_step(trainer)
    publish(trainer, pl_module, [Point(key, step, value) for key, value in zip(curves, values, strict=True)])
