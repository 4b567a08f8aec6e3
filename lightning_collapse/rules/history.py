"""History of curves: the first and the last points of those that rules follow, in constant memory."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import nan
from statistics import median
from typing import Any

from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.scores import nan_for_none, none_for_nan
from lightning_collapse.rules.task import Task
from lightning_collapse.rules.trend import Trend
from lightning_collapse.utilities.points import Point

TRAINING = "training"
"""Family of readings of the training as a whole, which rules of every family can read, see :attr:`Rule.of_training`."""
LAST = 5
"""Points that the present level of a curve is the median of."""


class Curve(Trend):
    """A curve so far: where it began, where it is and which way it goes.

    Attributes:
        count: Points so far.
        first: The first value.
        lowest: The lowest level so far.
        highest: The highest.

    Example:
        >>> curve = Curve()
        >>> for step, value in enumerate([8.0, 5.0, 4.0, 4.1, 3.9, 4.0]):
        ...     curve.update(step, value)
        >>> curve.first, curve.level
        (8.0, 4.0)
    """

    def __init__(self) -> None:
        super().__init__(transform="identity")
        self.count = 0
        self.first = self.lowest = self.highest = nan

    def update(self, step: int, value: float) -> None:
        """Take another point in; one that is not finite is left out."""
        before = self._steps
        super().update(step, value)
        if self._steps is not before:
            self.count += 1
            self.first = self._values[0] if self.count == 1 else self.first
            self.lowest = min(self.level, self.lowest) if self.count > 1 else self.first
            self.highest = max(self.level, self.highest) if self.count > 1 else self.first

    def restart(self) -> None:
        """Forget the last points, and not where the curve began: the next point does not follow the last."""
        self._steps, self._values, self._line = [], [], None

    @property
    def level(self) -> float:
        """Median of the last five points; NaN before there is one."""
        return median(self._values[-LAST:]) if self._values else nan

    @property
    def drop(self) -> float:
        """How far the median of the newer half of the last points is below that of the older, as a share of it."""
        half = len(self._values) // 2
        if not half:
            return 0.0
        older, newer = median(self._values[:half]), median(self._values[-half:])
        return (older - newer) / max(abs(older), 1e-300)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        ends = {name: none_for_nan(getattr(self, name)) for name in ("first", "lowest", "highest")}
        return {**super().state_dict(), "count": self.count, **ends}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state_dict)
        self.count = state_dict["count"]
        for name in ("first", "lowest", "highest"):
            setattr(self, name, nan_for_none(state_dict.get(name)))


@dataclass(frozen=True)
class Evidence:
    """All that is known of a layer at a point.

    Attributes:
        layer: Its name.
        points: Of this step by measure: those of the rule's family, those of the training, and those of other families
            as ``"{family}/{measure}"``, where the rule names them so.
        baseline: What the first points come to, see :meth:`Rule.update_baseline`.
        history: Of the curves that the rule follows, by the same names.
        detectors: Those of the rule, see :meth:`Rule.detectors`; this point is in them.
        planned: How many points the run will have, if that is known.
        task: What the network is trained for.
    """

    layer: str
    points: Mapping[str, Point]
    baseline: Mapping[str, float]
    history: Mapping[str, Curve]
    task: Task
    detectors: Mapping[str, Detector] = field(default_factory=dict)
    planned: int | None = None


class History:
    """The curves that any rule follows."""

    def __init__(self) -> None:
        self._curves: dict[tuple[str, str, str], Curve] = {}

    def update(self, points: Iterable[Point], followed: Collection[tuple[str, str]]) -> None:
        """Take the points of one step in; ``followed`` are families and measures."""
        for point in points:
            if (point.family, point.measure) in followed:
                self._curves.setdefault((point.family, point.layer, point.measure), Curve()).update(
                    point.step, point.value
                )

    def of(self, layer: str, names: Iterable[tuple[str, str]], reader: str = "") -> dict[tuple[str, str], Curve]:
        """Curves of a layer by family and measure, if there are any; a curve without a layer belongs to every layer.

        Of the training there may be curves for the rules of one family, the ``reader``.
        """
        found: dict[tuple[str, str], Curve] = {}
        for family, measure in names:
            place = reader if family == TRAINING else layer
            curve = self._curves.get((family, place, measure)) or self._curves.get((family, "", measure))
            if curve is not None:
                found[family, measure] = curve
        return found

    def clear(self) -> None:
        """Forget all curves."""
        self._curves.clear()

    def restart(self) -> None:
        """Forget the last points of all curves."""
        for curve in self._curves.values():
            curve.restart()

    def state_dict(self) -> list[dict[str, Any]]:
        """What a resumed run must know: lists, numbers and strings."""
        return [{"curve": list(key), "state": curve.state_dict()} for key, curve in self._curves.items()]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Go on where a checkpoint of the run left off."""
        self.clear()
        for entry in state:
            family, layer, measure = entry["curve"]
            self._curves[family, layer, measure] = curve = Curve()
            curve.load_state_dict(entry["state"])
