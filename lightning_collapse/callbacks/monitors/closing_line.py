"""Closing line: what the monitors of a fit have drawn, where nobody judges it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_collapse.reporting import PointReader
from lightning_collapse.rules.coverage import counted

if TYPE_CHECKING:
    from lightning_collapse.callbacks.monitors.monitor import Monitor


def say_unjudged(trainer: Trainer, drawn: Mapping[Monitor, int], first: bool) -> None:
    """Close a fit with one line about what was drawn, unless someone reads it.

    Args:
        trainer: Whose fit.
        drawn: All of its monitors, and how many points each has drawn.
        first: Whether this is the one of them that speaks.
    """
    silent = trainer.fast_dev_run or not first or not any(drawn.values())
    if silent or any(isinstance(callback, PointReader) for callback in trainer.callbacks):
        return
    told = [
        f"`{type(monitor).__name__}` ({counted(points, 'point')}"
        + (f" of {counted(len(monitor.window.taps), 'layer')})" if monitor.window is not None else ")")
        for monitor, points in drawn.items()
    ]
    rank_zero_info(f"{', '.join(told)}: nothing is judged; add `CollapseGuard()` to `callbacks` for verdicts.")
