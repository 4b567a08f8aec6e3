"""Publication of points: to the loggers and their dashboards, to ``callback_metrics`` and to whoever reads points."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_collapse.reporting.containments import METRICS, containment_of
from lightning_collapse.reporting.logger_adapters import log_curves
from lightning_collapse.reporting.run_dashboard import update_dashboard
from lightning_collapse.utilities.points import Point


@runtime_checkable
class PointReader(Protocol):
    """A callback that wants every point: :class:`~lightning_collapse.CollapseGuard` is one, yours can be another.

    Example:
        >>> class Printer:
        ...     def on_points(self, trainer, pl_module, points):
        ...         print(*(point.key for point in points))
        >>> isinstance(Printer(), PointReader)
        True
    """

    def on_points(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
        """Called on every process, with the same points, right after they were measured."""


def publish(trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
    """Hand ``points`` of one step to every logger, to ``trainer.callback_metrics`` and to every :class:`PointReader`.

    Not ``self.log``: it resamples at Lightning's own cadence, repeats stale values, and costs more than the
    mathematics. Every process must publish the same points, so that ``EarlyStopping`` and ``ModelCheckpoint`` decide
    alike everywhere. Points that are not to be drawn go to readers and to ``callback_metrics`` alone. A logger or a
    reader that raises an exception is left out for the rest of the fit, with one warning; the others go on.

    Example:
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(callback_metrics={}, loggers=[], callbacks=[])
        >>> publish(trainer, None, [Point("length", "encoder", "root_mean_square", 10, 2.0)])
        >>> trainer.callback_metrics
        {'length/encoder/root_mean_square': tensor(2.)}
    """
    if not points:
        return
    values = {point.key: point.value for point in points}
    drawn = [point for point in points if point.drawn]
    tensors = torch.tensor(list(values.values())).unbind()  # one by one they cost more than many a measure
    trainer.callback_metrics.update(zip(values, tensors, strict=True))
    for logger in trainer.loggers:
        containment = containment_of(logger)
        if METRICS not in containment.failed:
            with containment(METRICS, "this logger gets nothing from now on"):
                if drawn:
                    log_curves(logger, {point.key: point.value for point in drawn}, points[0].step)
                    update_dashboard(logger, drawn)
    for callback in trainer.callbacks:
        read = getattr(callback, "on_points", None)  # to ask for the protocol takes a hundred times as long
        if read is not None and not (containment := containment_of(callback)).failed:
            with containment("`on_points`", "it reads no points from now on"):
                read(trainer, pl_module, points)
