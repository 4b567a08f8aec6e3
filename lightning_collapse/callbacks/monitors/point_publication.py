"""Publication of a point: what all monitors of a trainer read in a step, in one transfer, alike on every process."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_collapse.callbacks.monitors.silent_layers import say_silent
from lightning_collapse.monitoring.to_host import Number, to_host
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.distributed import all_reduce_max, world_size
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.trainer import logging_step

if TYPE_CHECKING:
    from lightning_collapse.callbacks.monitors.monitor import Monitor

Key = tuple["Monitor | None", tuple[str, str]]
"""Of a reading: whose it is, the layer and the measure."""
_FAILED: Key = (None, ("", ""))
"""Of the one that says which monitors have failed on any process."""


def publish_together(monitors: Sequence[Monitor], trainer: Trainer, pl_module: LightningModule) -> None:
    """Read what all monitors have, bring it to the host at once, and publish it. Collective.

    Where the reading of a monitor fails on one process its point is left out on all of them: who stops, turns back or
    saves by what was published does so everywhere or nowhere.
    """
    step = logging_step(trainer)
    readings: dict[Key, Tensor] = {}
    numbers: dict[Monitor, dict[tuple[str, str], Number]] = {}
    made: dict[Monitor, Sequence[Point]] = {}
    for monitor in monitors:
        monitor._due = False
        with monitor.contained("reading a point", "the point is left out"):
            if monitor.measures_itself:
                made[monitor] = monitor.measure(trainer, pl_module, step)
            else:
                found = monitor.read(trainer, pl_module)
                readings.update({(monitor, name): tensor for name, tensor in found.items()})
                numbers[monitor] = {}
    if world_size() > 1:
        failed = [float(monitor not in made and monitor not in numbers) for monitor in monitors]
        readings[_FAILED] = all_reduce_max(torch.tensor(failed, device=pl_module.device))
    arrived = _arrived(readings, numbers)
    told = arrived.pop(_FAILED, [])
    for monitor in compress(monitors, told if isinstance(told, list) else [told]):
        monitor.contained.catch("reading a point", "the point is left out", RuntimeError("on another process"))
        for kept in (made, numbers):
            kept.pop(monitor, None)
    for (owner, name), number in arrived.items():
        if owner in numbers:
            numbers[owner][name] = number
    points = [point for monitor, own in made.items() for point in monitor.in_detail(own)]
    for monitor, values in numbers.items():
        with monitor.contained("making points", "the point is left out"):
            points += [p._replace(value=float(p.value)) for p in monitor.in_detail(monitor.points(step, values))]
    publish(trainer, pl_module, points)
    for monitor in monitors:
        with monitor.contained("drawing", "the picture is left out"):
            monitor.draw(trainer, step)
        monitor._points += 1
    say_silent(trainer, monitors)


def _arrived(readings: Mapping[Key, Tensor], monitors: Collection[Monitor]) -> dict[Key, Number]:
    """The readings on the host."""
    try:
        return to_host(readings)  # the one transfer of a step
    except Exception:  # of a monitor of the user's own; each by itself, so that the others have theirs
        arrived = to_host({key: value for key, value in readings.items() if key[0] is None})
        for monitor in monitors:
            with monitor.contained("bringing readings to the host", "the point is left out"):
                arrived |= to_host({key: value for key, value in readings.items() if key[0] is monitor})
        return arrived
