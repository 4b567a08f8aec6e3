"""Outcome: whether the score that counts in the end, such as a validation accuracy, has got worse for good."""

from collections.abc import Mapping
from math import isfinite, nan
from typing import Any, Literal, get_args

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.scores import nan_for_none, none_for_nan
from lightning_collapse.utilities.arguments import require_one_of
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import register_curve

OUTCOME = "outcome"
"""Family of the points of an outcome; its name stands for the layer."""
Mode = Literal["max", "min"]
MODES: tuple[Mode, ...] = get_args(Mode)

register_curve(OUTCOME, "value", reads="a logged metric", range="any", collapsed="up to its `mode`")
register_curve(OUTCOME, "best", reads="the best of it so far", range="any")
register_curve(
    OUTCOME,
    "shift",
    reads="sum of its scores over the threshold",
    range="0 up",
    collapsed="1 or more, until it recovers",
)
register_curve(OUTCOME, "onset", reads="step since when it got worse, NaN if it has not", range="0 up")


class Outcome:
    """A score over the run: its best, whether it has fallen for good, and that in words.

    A :class:`~lightning_collapse.rules.Detector` with its budget of one false alarm in a hundred runs decides whether
    it has; before the detector is armed, after 16 points in runs of at most 200 and after 64 in longer ones, nothing
    has. It stays so until the score is nearer to its best than to the worst since. The detector reads the logarithm of
    scores that are to fall and begin above zero, such as losses, and others as they are.

    What it misses is what the detector misses: in runs of 40 points many a fall, and a large one may take seven points.

    Args:
        name: What the score is called.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is.

    Attributes:
        planned: Points of a whole run, as far as is known; set it before the first.
        count: Points so far.
        value: The latest score.
        best: The best so far.
        since: Step since when it has got worse for good; ``None`` if it has not.

    Example:
        >>> outcome = Outcome("val_acc", "max")
        >>> outcome.planned = 40
        >>> for step in range(34):
        ...     accuracy = 0.9 + 0.01 * (step * 7 % 5 - 2) - 0.4 * (step >= 26)
        ...     points = outcome.update(step, accuracy)
        >>> outcome.in_words()
        '`val_acc` fell from 0.92 to 0.49 since step 24'
    """

    def __init__(self, name: str, mode: str) -> None:
        require_one_of(MODES, mode=mode)
        self.name = name
        self.mode = mode
        self.planned: int | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new run begins."""
        self.count = 0
        self.value = self.best = self._worst = nan
        self.since: int | None = None
        self._detector: Detector | None = None

    def restart(self) -> None:
        """Forget that it has fallen, with the same best: the state of training was turned back."""
        self._worst, self.since = nan, None
        if self._detector is not None:
            self._detector.restart()

    def update(self, step: int, value: float) -> list[Point]:
        """Take another score in; one that is not finite is left out.

        Returns:
            The points of this step: the score, the best so far, the sum over its threshold, and since when.
        """
        if not isfinite(value):
            return []
        detector = self._detector_for(value)
        self.count, self.value = self.count + 1, value
        self.best = {"max": max, "min": min}[self.mode](value, value if self.count == 1 else self.best)
        shift = detector.update(step, value)
        self._note_fall(step, value, shift)
        onset = nan if self.since is None else float(self.since)
        # the detector gets used to a new level, which is no better for it
        shift = shift if self.since is None else max(shift, 1.0)
        readings = {"value": value, "best": self.best, "shift": shift, "onset": onset}
        return [Point(OUTCOME, self.name, measure, step, reading) for measure, reading in readings.items()]

    def _note_fall(self, step: int, value: float, shift: float) -> None:
        """Since when it has fallen, and to what; or that it has recovered."""
        onset = step if self._detector is None or self._detector.since is None else self._detector.since
        if self.since is None:
            self.since, self._worst = (onset, value) if shift >= 1 else (None, nan)
            return
        self._worst = {"max": min, "min": max}[self.mode](value, self._worst)
        if shift < 1 and abs(value - self.best) < abs(value - self._worst):
            self.since, self._worst = None, nan

    def in_words(self) -> str:
        """Whether it has moved yet."""
        name, best = f"`{self.name}`", f"best {self.best:.3g}"
        if not self.count or self._detector is None:
            return f"{name} is not known yet"
        if self.since is not None:
            moved = "fell" if self.mode == "max" else "rose"
            return f"{name} {moved} from {self.best:.3g} to {self.value:.3g} since step {self.since}"
        if self.value == self.best or self.count > self._detector.armed_after:
            return f"{name} has not moved yet ({self.value:.3g}, {best})"
        return f"{name} is {self.value:.3g}, {best}, and {self.count} points are too few to tell a fall from noise"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: numbers, strings and lists."""
        detector = self._detector
        return {
            "planned": self.planned,
            "count": self.count,
            "value": none_for_nan(self.value),
            "best": none_for_nan(self.best),
            "worst": none_for_nan(self._worst),
            "since": self.since,
            "transform": "" if detector is None else detector.transform,
            "detector": {} if detector is None else detector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self.planned, self.count, self.since = (state[name] for name in ("planned", "count", "since"))
        self.value, self.best, self._worst = (nan_for_none(state[name]) for name in ("value", "best", "worst"))
        self._detector = None
        if state["transform"]:
            self._detector = self._new_detector(positive=state["transform"] == "log")
            self._detector.load_state_dict(state["detector"])

    def _detector_for(self, value: float) -> Detector:
        """The detector; a new one at the first score, and at the first below zero where logarithms were taken."""
        if self._detector is None:
            self._detector = self._new_detector(positive=self.mode == "min" and value > 0)
        elif self._detector.transform == "log" and value < 0:
            self._detector = self._new_detector(positive=False)
        return self._detector

    def _new_detector(self, positive: bool) -> Detector:
        side = "fall" if self.mode == "max" else "rise"
        return Detector(self.planned, side=side, transform="log" if positive else "identity")  # type: ignore[arg-type]


@register_rule
class OutcomeDrop(Rule):
    """The outcome that ``CollapseGuard(outcome=...)`` watches has got worse for good.

    Judged by a :class:`~lightning_collapse.rules.Detector` with a budget of one false alarm in a hundred runs, from
    the 17th point on (the 65th of more than 200). It says that the run suffers, not why: other verdicts do.

    Example:
        >>> values = {"value": 0.4, "best": 0.9, "shift": 2.0}
        >>> points = {name: Point("outcome", "val_acc", name, 9, value, n=256) for name, value in values.items()}
        >>> OutcomeDrop().severity(points, {"value": 0.3})
        2.0
    """

    kind = "outcome_drop"
    says = "The outcome you watch, `{layer}`, has got worse for good."
    family = OUTCOME
    measures = ("value", "best", "shift")
    optional = ("onset",)
    higher_is_worse = ("shift",)
    patience = 1
    advice = "Look at the other verdicts for the reason; `Rollback()` returns to what was healthy."
    paper = "Page, 1954, Biometrika 41; Hawkins, 1987, The Statistician 36"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The sum of the detector over its threshold."""
        return points["shift"].value

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The score, its best, and the sum."""
        value, best, shift = (points[name].value for name in self.measures)
        return (
            f"it is {value:.3g}, where its best was {best:.3g} and the run began with {baseline['value']:.3g}; its"
            f" scores add up to {shift:.2g} times the threshold that one healthy run in a hundred crosses"
        )

    def onset(self, evidence: Evidence, since: int) -> int:
        """The step of the detector, if it knows one."""
        onset = evidence.points["onset"].value if "onset" in evidence.points else nan
        return int(onset) if isfinite(onset) else since

    def update_baseline(self, so_far: float, value: float, count: int) -> float:
        """The first value."""
        return so_far
