"""Weights over tasks: how fast an average follows them, and which part of an update is kept.

All names are here and not beside the other functions: ``from lightning_collapse.functional import task_weights``, then
``task_weights.consolidated_update(...)``.
"""

from lightning_collapse.functional.task_weights.consolidated_update import consolidated_update
from lightning_collapse.functional.task_weights.dynamic_ema import dynamic_ema_decay

__all__ = ["consolidated_update", "dynamic_ema_decay"]
