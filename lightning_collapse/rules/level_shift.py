"""Level shift: a change detector that goes on to tell how long the curve stays on its new level."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import exp, isfinite, isnan, log
from statistics import median
from typing import Any

from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.scores import transformed

FIRST = 8
"""Points whose median is where the curve began, and whose median is its present level."""
QUIET = 4
"""Points below the middle between the old and the new level after which a shift is over."""

HIGH = log(4)


@dataclass
class _Shift:
    """One shift: the level before it, the highest point since, and how many points have been where."""

    base: float
    peak: float
    since: int
    above: int = 0
    below: int = 0
    over_start: int = 0


class LevelShift(Detector):
    """A :class:`~lightning_collapse.rules.Detector` of rises of a positive curve, and of how long each of them lasts.

    From an alarm on the curve is compared with the middle, in logarithms, between the level before the shift and the
    highest point since: a spike that comes back is over after four points below it. The baseline of the detector itself
    accepts a level after 64 points, and says no more about it than that it was new.

    Args:
        planned: Points of a whole run; ``None`` for unknown, which counts as 1,000.
        curves: How many curves share the budget.
        budget: Allowed false alarms per healthy run, over all the curves.

    Example:
        >>> shift = LevelShift(planned=100)
        >>> for step in range(60):
        ...     _ = shift.update(step, (1.0 if step < 40 else 3.0) + 0.01 * (step * 7 % 5))
        >>> shift.onset, shift.lasted, round(shift.ratio, 1)
        (38, 18, 3.0)
    """

    def __init__(self, planned: int | None = None, curves: int = 1, budget: float = 0.01) -> None:
        super().__init__(planned, curves, budget)
        self._first: list[float] = []
        self._last: list[float] = []
        self._shift: _Shift | None = None

    @property
    def lasted(self) -> int:
        """Points on the new level since the alarm; 0 where there is none, or it is over."""
        return self._shift.above if self._shift else 0

    @property
    def over_start(self) -> int:
        """Points in a row since the alarm above where the curve began, and above four times the level before."""
        return self._shift.over_start if self._shift else 0

    @property
    def onset(self) -> int | None:
        """Step before the shift that goes on, as far as is known."""
        return self._shift.since if self._shift else None

    @property
    def ratio(self) -> float:
        """Present level over that before the shift; 1 where there is none."""
        return exp(median(self._last) - self._shift.base) if self._shift and self._last else 1.0

    def update(self, step: int, value: float) -> float:
        """Take another point in."""
        base = self._state.mean
        statistic = super().update(step, value)
        y = transformed(value, self.transform)
        if isfinite(y):
            self._last = [*self._last[1 - FIRST :], y]
            if len(self._first) < FIRST:
                self._first.append(y)
        if self._shift is None and statistic >= 1 and isfinite(y):
            self._shift = _Shift(base, y, int(step) if self.since is None else self.since)
        if self._shift is not None:
            self._follow(self._shift, y)
        return statistic

    def restart(self) -> None:
        """Forget the shift and the last points, with the same baseline."""
        super().restart()
        self._shift, self._last = None, []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        shift = None if self._shift is None else asdict(self._shift)
        return {"detector": super().state_dict(), "first": self._first, "last": self._last, "shift": shift}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state_dict["detector"])
        self._first, self._last = list(state_dict["first"]), list(state_dict["last"])
        self._shift = None if state_dict["shift"] is None else _Shift(**state_dict["shift"])

    def _follow(self, shift: _Shift, y: float) -> None:
        """Count a point of a shift; one that is no number is on the new level."""
        if not isnan(y):
            shift.peak = max(shift.peak, y)
        is_above = isnan(y) or y > (shift.base + shift.peak) / 2
        shift.above += is_above
        shift.below = 0 if is_above else shift.below + 1
        # four times the level before: a curve that is flat is soon above its first points
        is_over_start = isnan(y) or y > max(median(self._first), shift.base + HIGH)
        shift.over_start = shift.over_start + 1 if is_over_start else 0
        if shift.below >= QUIET and not is_over_start:
            self._shift = None
