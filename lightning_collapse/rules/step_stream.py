"""Step stream: shifts, bursts and non-finite steps of one optimizer, from its steps one after another."""

from collections import deque
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from statistics import fmean, median
from typing import Any, NamedTuple

from lightning_collapse.rules.level_shift import LevelShift
from lightning_collapse.rules.scores import nan_for_none, none_for_nan

RATE = 10_000
"""Steps that the spike rate is over."""
SKIPS = 1000
"""Steps that the share of skipped ones is of."""
SETTLED, PRESENT = 32, 8
"""Steps of the loss before a shift of the norm, and now, whose medians are compared."""
_NUMBERS = ("steps", "nonfinite", "in_a_row", "skipped")


class Step(NamedTuple):
    """One optimizer step.

    Attributes:
        loss: Mean over processes and accumulated batches; NaN where it is not known.
        grad_norm: Of the whole gradient.
        loss_z: Robust score of its logarithm; NaN where there is none.
        grad_norm_z: The same of the norm.
        flagged: Above 0 if it is a burst or not finite.
        nonfinite: Above 0 if it is not finite.
        skipped: Above 0 if its update was skipped.
        accepted: Above 0 if it is the last of so many bursts in a row that their level is taken for the new one.

    Example:
        >>> step = Step(loss=2.3, grad_norm=0.7)
        >>> step.flagged, step.loss_z
        (0.0, nan)
    """

    loss: float
    grad_norm: float
    loss_z: float = nan
    grad_norm_z: float = nan
    flagged: float = 0.0
    nonfinite: float = 0.0
    skipped: float = 0.0
    accepted: float = 0.0


class StepStream:
    """What is known of the steps of one optimizer, in constant memory.

    Args:
        planned: Steps of the whole run; ``None`` for unknown.

    Attributes:
        loss: What tells a shift of the loss.
        norm: The same of the gradient norm.
        steps: Steps so far.
        nonfinite: Those that were not finite.
        in_a_row: Such steps in a row up to now.
        skipped: Steps that were skipped.

    Example:
        >>> stream = StepStream(planned=100)
        >>> found = stream.update(range(60), [Step(2.0 + 0.01 * (i * 7 % 5), 1.0 + 4 * (i >= 40)) for i in range(60)])
        >>> found["grad_norm_cusum"] >= 1, found["since"], round(found["grad_norm_ratio"]), found["loss_cusum"] >= 1
        (True, 39.0, 5, False)
    """

    def __init__(self, planned: int | None) -> None:
        self.loss, self.norm = (LevelShift(planned, curves=2) for _ in range(2))
        self.steps = self.nonfinite = self.in_a_row = self.skipped = 0
        self._recent: deque[float] = deque(maxlen=SETTLED)
        self._before = nan  # the loss before the norm shifted
        self._bursts: deque[int] = deque()
        self._skips: deque[int] = deque()
        self._failed = -1  # the first of the steps in a row that are not finite

    def update(self, numbers: Sequence[int], steps: Sequence[Step]) -> dict[str, float]:
        """Take the steps since the last point in; a step that was skipped shifts nothing.

        Args:
            numbers: Of the steps.
            steps: What they were.

        Returns:
            Readings of the point by measure, as :class:`~lightning_collapse.StabilityMonitor` declares them.
        """
        loss_cusum, norm_cusum = self.loss.statistic, self.norm.statistic
        for number, step in zip(numbers, steps, strict=True):
            if step.nonfinite and not self.in_a_row:
                self._failed = int(number)
            self._count(step)
            if self.norm.onset is None and self._recent:
                self._before = median(self._recent)
            loss_cusum = max(loss_cusum, self.loss.update(number, nan if step.skipped else step.loss))
            norm_cusum = max(norm_cusum, self.norm.update(number, nan if step.skipped else step.grad_norm))
            if isfinite(step.loss):
                self._recent.append(step.loss)
        onset = self.norm.onset if self.loss.onset is None else self.loss.onset
        if self.in_a_row:
            onset = self._failed
        return {
            "loss": _mean([step.loss for step in steps]),
            "grad_norm": _mean([step.grad_norm for step in steps]),
            "loss_z": _largest([step.loss_z for step in steps]),
            "grad_norm_z": _largest([step.grad_norm_z for step in steps]),
            "loss_cusum": loss_cusum,
            "grad_norm_cusum": norm_cusum,
            "loss_shifted": float(self.loss.lasted),
            "loss_over_start": float(self.loss.over_start),
            "loss_change": self._loss_change,
            "grad_norm_ratio": self.norm.ratio,
            "since": nan if onset is None else float(onset),
            "spike_rate": len(self._bursts) / min(max(self.steps, 1), RATE),
            "nonfinite_steps": float(self.nonfinite),
            "nonfinite_in_a_row": float(self.in_a_row),
            "skipped": float(self.skipped),
            "skipped_share": len(self._skips) / SKIPS,
            "accepted": float(sum(step.accepted > 0 for step in steps)),
        }

    @property
    def calm(self) -> bool:
        """Whether neither loss nor norm is on a new level, and the last step is finite."""
        return self.loss.onset is None and self.norm.onset is None and not self.in_a_row

    def restart(self) -> None:
        """Training was turned back: what comes next does not follow what was last."""
        self.loss.restart()
        self.norm.restart()
        self._recent.clear()
        self._skips.clear()
        self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: numbers, lists, dicts and ``None``."""
        return {
            "loss": self.loss.state_dict(),
            "norm": self.norm.state_dict(),
            "recent": list(self._recent),
            "before": none_for_nan(self._before),
            "bursts": list(self._bursts),
            "skips": list(self._skips),
            "failed": self._failed,
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.loss.load_state_dict(state["loss"])
        self.norm.load_state_dict(state["norm"])
        self._recent = deque(state["recent"], maxlen=SETTLED)
        self._before = nan_for_none(state["before"])
        self._bursts, self._skips = deque(state["bursts"]), deque(state["skips"])
        self._failed = state["failed"]
        for name in _NUMBERS:
            setattr(self, name, state[name])

    def _count(self, step: Step) -> None:
        self.steps += 1
        self.nonfinite += step.nonfinite > 0
        self.in_a_row = self.in_a_row + 1 if step.nonfinite else 0
        self.skipped += step.skipped > 0
        if step.flagged and not step.nonfinite:
            self._bursts.append(self.steps)
        if step.skipped:
            self._skips.append(self.steps)
        for of, within in ((self._bursts, RATE), (self._skips, SKIPS)):
            while of and of[0] <= self.steps - within:
                of.popleft()

    @property
    def _loss_change(self) -> float:
        """Present level of the loss over that before the norm shifted; 1 where it has not."""
        if self.norm.onset is None or not self._before > 0 or not self._recent:
            return 1.0
        return median(list(self._recent)[-PRESENT:]) / self._before


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN without one."""
    return fmean(finite) if (finite := [value for value in values if isfinite(value)]) else nan


def _largest(values: Sequence[float]) -> float:
    return max((value for value in values if isfinite(value)), default=nan)
