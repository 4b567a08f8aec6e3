"""Change point of a curve: where a task ends that nobody has announced (task-free continual learning)."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan, nan
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_collapse.rules.burst import Burst
from lightning_collapse.utilities.trainer import logging_step


class ChangeDetector(Protocol):
    """What takes points of a curve in, such as :class:`~lightning_collapse.rules.Burst`."""

    def update(self, step: int, value: float) -> float:
        """A score, 1 or more for an alarm."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""


class CurveJump:
    """Whether a curve of ``trainer.callback_metrics`` has jumped: for ``TaskBoundary(when=CurveJump("train_loss"))``.

    Every point of the curve goes into a sequential detector, which begins anew behind an alarm. What processes have
    logged is averaged over them, so that all decide the same, from the same state; the state is in that of the
    boundary, so a resumed run decides as one that was not interrupted. A point that is not finite is a gap, and a value
    that was not published since it was last read does not count twice.

    A boundary is found only *after* data have changed: a task ends with a few points of the next one in it, and a
    penalty that reads training data then reads those of the next task. Take one that reads none
    (``SynapticIntelligence``, ``RWalk``), or give a ``loader`` over a memory of what was seen.

    Args:
        curve: Name of the curve: one that the module logs, or a callback of this library.
        detector: What judges points; by default ``Burst()``, a jump upwards from the 18th point on, at 1 % false
            alarms per 1,000 points of Gaussian noise; ``Burst(planned=200)`` sees smaller ones where a run has no more
            points, and a noisy loss of few points needs that. ``rules.Detector`` sees small lasting shifts of a curve
            that is level. ``None`` takes the curve itself for a score of which 1 and more is an alarm, such as
            ``drift/{layer}/jump`` and ``drift/{layer}/changed`` of ``DriftMonitor``; it alarms where the score rises
            to that, and not while it stays there.

    Raises:
        ValueError: If ``curve`` is no name, or ``detector`` cannot take points in.

    Example::

        boundary = TaskBoundary(when=CurveJump("val/perplexity", Burst(planned=100)))
        trainer = Trainer(callbacks=[boundary, WeightPenalty(SynapticIntelligence())])
    """

    _DEFAULT: Any = object()

    def __init__(self, curve: str, detector: ChangeDetector | None = _DEFAULT) -> None:
        if not isinstance(curve, str) or not curve:
            raise ValueError(f"`curve` takes the name of a curve in `trainer.callback_metrics`, got {curve!r}.")
        detector = Burst() if detector is self._DEFAULT else detector
        if detector is not None and not all(
            callable(getattr(detector, name, None)) for name in ("update", "state_dict", "load_state_dict")
        ):
            raise ValueError(f"`detector` takes `rules.Burst()`, `rules.Detector()` or None, got {detector!r}.")
        self.curve, self.detector = curve, detector
        self._fresh = None if detector is None else detector.state_dict()
        self._above = False
        self._latest: Tensor | None = None
        self._warned = False

    def __call__(self, trainer: Trainer) -> bool:
        """Whether it has jumped since it was last asked. Collective, and the same on every process."""
        value, step = self._read(trainer), logging_step(trainer)
        if isnan(value):
            return False
        score = value if self.detector is None else self.detector.update(step, value)
        was_above, self._above = self._above, score >= 1
        if not self._above or was_above:
            return False
        if self.detector is not None:
            self.detector.load_state_dict(self._fresh or {})
            self._above = False
        rank_zero_info(f"`CurveJump`: `{self.curve}` has jumped to {value:.4g}, seen at step {step}.")
        return True

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists."""
        return {"above": self._above, "detector": None if self.detector is None else self.detector.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._above = state_dict["above"]
        if self.detector is not None and state_dict["detector"] is not None:
            self.detector.load_state_dict(state_dict["detector"])

    def _read(self, trainer: Trainer) -> float:
        """Mean over processes of a point that is new; NaN where there is none."""
        metrics = trainer.callback_metrics
        latest = metrics.get(self.curve)
        if latest is None and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"`CurveJump({self.curve!r})`: there is no such curve yet, so no task ends. There are:"
                f" {', '.join(metrics) or 'none'}. Log it with `self.log(name, value)`, or correct the name."
            )
        is_new = isinstance(latest, Tensor) and latest is not self._latest
        self._latest = latest
        value = latest.detach().float() if is_new and latest is not None else torch.tensor(nan)
        value = value.to(trainer.strategy.root_device)
        mean = float(trainer.strategy.reduce(value, reduce_op="mean"))
        return mean if mean - mean == 0 else nan
