"""Growth: a change detector for curves that rise when all is well, such as norms: it watches how fast they do."""

from collections.abc import Mapping
from math import isfinite, log, nan
from typing import Any

from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.scores import nan_for_none, none_for_nan


class Growth(Detector):
    """A :class:`~lightning_collapse.rules.Detector` of the logarithm of the ratio of two points that follow each other.

    Args:
        planned: Points of a whole run; ``None`` for unknown, which counts as 1,000.
        curves: How many curves share the budget.
        budget: Allowed false alarms per healthy run, over all the curves.

    Example:
        >>> growth = Growth(planned=60)
        >>> for step in range(40):
        ...     norm = 3 * 1.002**step * 1.05 ** max(step - 29, 0) * (1 + 0.001 * (step * 7 % 5))
        ...     if growth.update(step, norm) >= 1:
        ...         break
        >>> step, growth.since
        (32, 28)
    """

    def __init__(self, planned: int | None = None, curves: int = 1, budget: float = 0.01) -> None:
        super().__init__(planned, curves, budget, "rise", "identity")
        self._before = nan

    def update(self, step: int, value: float) -> float:
        """Take another point in; what is not a positive number is a gap."""
        known = isfinite(value) and value > 0
        rate = log(value / self._before) if known and isfinite(self._before) else nan
        self._before = float(value) if known else nan
        return super().update(step, rate)

    def restart(self) -> None:
        """Forget the sums and the last point, with the same baseline."""
        super().restart()
        self._before = nan

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"detector": super().state_dict(), "before": none_for_nan(self._before)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state_dict["detector"])
        self._before = nan_for_none(state_dict["before"])
