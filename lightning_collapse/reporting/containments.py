"""Containments of what is reported: one per logger and per point reader, for the run."""

from typing import Any

from lightning.pytorch import Trainer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_collapse.utilities.containment import Containment

METRICS = "`log_metrics`"
"""The place of curves: a logger that refuses them is left out altogether."""
_CONTAINMENTS: Any = WeakIdKeyDictionary()  # by identity: a logger of the user's own need not be hashable


def containment_of(owner: object) -> Containment:
    """What has failed so far of a logger or of a callback that reads points."""
    if owner not in _CONTAINMENTS:
        _CONTAINMENTS[owner] = Containment(type(owner).__name__)
    containment: Containment = _CONTAINMENTS[owner]
    return containment


def try_again(trainer: Trainer) -> None:
    """Forget what has failed of a trainer's loggers and callbacks: its fit is over. May be called more than once.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from types import SimpleNamespace
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> logger = CSVLogger(mkdtemp())
        >>> containment_of(logger).failed["`log_text`"] = "a full disk"
        >>> try_again(SimpleNamespace(loggers=[logger], callbacks=[]))
        >>> containment_of(logger).failed
        {}
    """
    for owner in (*trainer.loggers, *trainer.callbacks):
        _CONTAINMENTS.pop(owner, None)
