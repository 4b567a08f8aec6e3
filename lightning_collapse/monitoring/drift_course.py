"""Drift over time of one layer: whether its law is another one, whether it moves faster, and whether it settles."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, nan
from typing import Any

import torch

from lightning_collapse.functional.drift import equilibrium, spent_level
from lightning_collapse.rules.detector import Detector

FIRST_FIT, LONGEST_FIT = 50, 200
FITTED = ("level", "error", "half_life", "bounded")


class DriftCourse:
    """Sequential tests of the curves of a layer, with stated levels.

    Args:
        planned: Points of the run, ``None`` if unknown.
        layers: That share the level of :meth:`jump`.
        level: Allowed false alarms of a run.

    Attributes:
        since: Step before the jump, as far as is known.

    Example:
        >>> course = DriftCourse(planned=100, layers=1, level=0.05)
        >>> course.changed(0.5), course.changed(0.02), course.changed(0.001)
        (0.0, 0.0, 1.0)
    """

    def __init__(self, planned: int | None, layers: int, level: float) -> None:
        self.level = level
        self._detector = Detector(planned, layers, level)
        self._tests = 0
        self._distances: list[float] = []

    @property
    def since(self) -> int | None:
        """Step of the last point before the rate rose."""
        return self._detector.since

    def changed(self, p: float) -> float:
        """1 where a test against one reference rejects, at a level that all tests of the run together keep."""
        self._tests += 1
        return float(p <= spent_level(self.level, self._tests))

    def jump(self, step: int, rate: float) -> tuple[float, bool]:
        """The statistic of the sequential test over its threshold, 1 or more an alarm; and whether that is new."""
        before, now = self._detector.statistic, self._detector.update(step, rate)
        return now, now >= 1 > before

    def settle(self, distance: float) -> dict[str, float]:
        """Equilibrium of the later half of the distances, 50 to 200 of them; NaN before there are 50."""
        if isfinite(distance):
            self._distances.append(distance)
            del self._distances[: -2 * LONGEST_FIT]
        if len(self._distances) < FIRST_FIT:
            return dict.fromkeys(FITTED, nan)
        late = self._distances[-max(FIRST_FIT, len(self._distances) // 2) :]
        fitted = equilibrium(torch.tensor(late, dtype=torch.float64))
        return {name: float(getattr(fitted, name)) for name in FITTED}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"detector": self._detector.state_dict(), "tests": self._tests, "distances": list(self._distances)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._detector.load_state_dict(state["detector"])
        self._tests, self._distances = state["tests"], list(state["distances"])
