"""Loss-term curves: what a regularizer or a penalty adds to the loss."""

from collections.abc import Collection
from functools import lru_cache

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_collapse.reporting.publish import publish
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.trainer import is_due, logging_step

Curve = tuple[str, str, str]
"""Family, name of the term's owner, measure."""


def term_curves(name: str, total: Tensor, terms: dict[str, Tensor], family: str = "regularizer") -> dict[Curve, Tensor]:
    """Curves of one regularizer or penalty, without graph.

    Args:
        name: Its name.
        total: What it adds to the loss, weight included; a scalar.
        terms: What else there is to draw, by name, such as its unweighted terms; scalars.
        family: First part of the names.

    Returns:
        ``{family}/{name}/value`` and ``{family}/{name}/{term}``.
    """
    return {(family, name, term): value.detach() for term, value in {"value": total, **terms}.items()}


def terms_are_due(trainer: Trainer) -> bool:
    """Whether the running batch is a training batch that ends in a logging step."""
    return trainer.training and is_due(trainer, trainer.log_every_n_steps)


def publish_terms(
    trainer: Trainer, pl_module: LightningModule, curves: dict[Curve, Tensor], unless_zero: Collection[str] = ()
) -> dict[Curve, float]:
    """Publish scalars that are the same on every process; the one wait for the device of a logging step.

    Args:
        trainer: Whose loggers.
        pl_module: Its module.
        curves: Scalars, see :func:`term_curves`.
        unless_zero: Measures that are left out where they are 0.

    Returns:
        The numbers that were published.
    """
    if not curves:
        return {}
    numbers = torch.stack([value.float() for value in curves.values()]).tolist()
    values = {
        curve: number
        for curve, number in zip(curves, numbers, strict=True)
        if number != 0 or curve[2] not in unless_zero
    }
    step = logging_step(trainer)
    publish(trainer, pl_module, [Point(*curve, step, value) for curve, value in values.items()])
    return values


def offer_terms(trainer: Trainer, curves: dict[Curve, Tensor]) -> None:
    """Between logging steps: what early stopping and checkpoints ask for when an epoch ends is there, and is fresh."""
    trainer.callback_metrics.update({_key(curve): value.float() for curve, value in curves.items()})


@lru_cache(maxsize=4096)
def _key(curve: Curve) -> str:
    return Point(*curve, 0, 0.0).key
