"""Sequential change detection: a self-starting CUSUM with a stated rate of false alarms."""

from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, field
from math import isnan, nan, sqrt
from typing import Any, Literal

from lightning_collapse.rules.scores import (
    PLANNED,
    Budgeted,
    Side,
    Transform,
    cusum_threshold,
    nan_for_none,
    none_for_nan,
    normal_score,
    transformed,
)

FORGET = 1 / 64
"""Smallest weight of a new point: the baseline forgets with a half-life of 44 points, or is blind on a falling loss."""
SLACK = 0.5
"""Standard deviations that the score may be high without consequence; quickest for shifts of twice as many."""
CAP = 3.0
"""Scores count for no more: without it Student-t(3) noise alarms once in 3,200 points instead of 100,000."""
OUTLIER, WILD = 3.0, 8.0
"""Standard deviations of an error beyond which the variance learns no more of it: while the sum is above 0, so that a
shift does not hide itself, and once it is 0 again; with the first alone heavy tails look too narrow."""
FAR = 3.0
"""Root mean squares of the deviations beyond which the mean and the autocorrelation learn no more of one: a point
of Student-t(3) noise may lie 50 standard deviations out, and would move the mean by one."""
FEW = 8
"""Points before which errors are taken as they are, and as uncorrelated."""
LARGEST_PHI = 0.95
FROZEN = 64
"""Points in a row without learning after which the new level is accepted."""
MEMORY = int(2 / FORGET) - 1
"""Equally weighted points that know as much as the baseline does."""
SHORT_RUN, SHORT, LONG = 200, (16, 2.0), (64, 3.65)
"""Planned points up to which a run is short; points before a detector is armed, and how far below the threshold the
baseline is kept, of short and of long runs."""


@dataclass
class _State:
    """What is known of a curve: the symbols of :class:`Detector`."""

    count: int = 0
    mean: float = 0.0
    last: float = nan
    product: float = 0.0
    square: float = 0.0
    variance: float = 0.0
    pending: float = 0.0
    frozen: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    onsets: list[int] = field(default_factory=lambda: [-1, -1])


class Detector(Budgeted):
    r"""Alarms when the level of a curve shifts, with at most ``budget`` false alarms per healthy run; constant state.

    A point :math:`y_t` (after the transform) is predicted from the one before it, with the mean, the lag-1
    autocorrelation and the error variance of earlier points alone, so that the first scores are as trustworthy as the
    last (self-starting [2]); the scores :math:`z_t` are standard normal, and sum up (CUSUM [1]):

    .. math:: e_t = (y_t - m) - \hat\varphi (y_{t-1} - m), \qquad z_t = \Phi^{-1}(F_{\nu}(e_t / s)), \qquad
        U_t = \max(0,\; U_{t-1} + \min(z_t, 3) - \tfrac12)

    with :math:`s^2` the mean square of earlier errors; behind a point that is far from the mean the variance of
    :math:`\hat\varphi` times its squared distance counts too, as for the prediction of any regression. It alarms while
    :math:`U_t \ge h`. The baseline forgets (half-life 44 points), is kept while :math:`U_t` is
    above ``freeze``, and accepts a new level after 64 such points: then everything starts anew.

    **Threshold.** ``planned * curves / budget`` points on average to a false alarm (the union bound, which holds
    whatever the dependence of the curves; twice that for two sides) give :math:`h`.

    **Settings.** Runs of at most 200 points are judged from the 17th on, longer ones from the 65th. The baseline is
    kept from 2 below :math:`h` on, 3.65 in long runs, but never before a third capped score: what it is wrong by adds
    up over the rest of the way, so this must not grow with the number of curves. The variance takes outliers in full,
    up to 8 deviations, once the sum is back at 0, and up to 3 before: with 3 alone, Student-t(3) noise looks narrower
    than it is; with 8 alone, larger shifts hide themselves. The mean and the autocorrelation take deviations of up to 3
    root mean squares: one point of Student-t(3) noise may lie 50 out, and moved the mean until 200 curves of 1,000
    points alarmed in 4 to 7 % of runs.

    **Measured** by ``tests/benchmarks/false_alarms.py`` with a budget of 1 %, on Gaussian noise and autocorrelations of
    0, 0.5 and 0.9, one curve: false alarms in 0.03, 0.21, 0.40 % of runs of 40 points, 0.16, 0.37, 0.62 % of 100, 0.05,
    0.18, 0.20 % of 1,000; Student-t(3) noise 0.10, 0.24, 0.45 %, 0.25, 0.44, 0.81 %, 0.05, 0.03, 0.35 %; 20 and 200
    curves, either noise: none above 0.75 %, and 0.10 % of 200 curves with a common part. Found of shifts in the middle
    of 100 points, by 3 standard deviations of the curve: 100, 50, 7 %, median delay 5 points; by 5: 100, 76, 21 %; of
    1,000 points 100, 91, 4 % and 100, 99, 26 %; of 40 points no more than 60 %.

    **Blind to** shifts before it is armed, which it learns as normal, and soon after; most shifts of 200 curves in 40
    points, or in 100 but for uncorrelated noise; level shifts at an autocorrelation of 0.9, where the curve itself
    wanders as far; trends below 0.002 standard deviations a point, while 0.005 and 0.01 alarm in 17 and 65 % of runs of
    1,000 points: give curves with a healthy trend as differences or rates; a rise on a falling curve: of jumps by 5
    standard deviations on a loss that falls with a time constant of 300 points 90, 5, 1 % are found, by 3 none, and in
    runs of 100 points none at all, see :class:`~lightning_collapse.rules.Burst`; periods, such as those of epochs,
    which were not simulated.

    Args:
        planned: Points of a whole run; ``None`` for unknown, which counts as 1,000.
        curves: How many curves share the budget.
        budget: Allowed false alarms per healthy run, over all the curves.
        side: Whether a rise, a fall, or both are shifts.
        transform: Scale where noise is even: ``"log"`` of positive curves such as losses and norms, ``"logit"`` of
            fractions, ``"identity"`` of cosines.

    References:
        [1] Page, *Continuous inspection schemes*, Biometrika 1954.
        [2] Hawkins, *Self-starting CUSUM charts for location and scale*, The Statistician 1987.

    Example:
        >>> detector = Detector(planned=100)
        >>> for step in range(60):
        ...     loss = 1.0 + 0.01 * (step * 7 % 5 - 2) + 0.1 * (step >= 50)
        ...     statistic = detector.update(step, loss)
        ...     if statistic >= 1:
        ...         break
        >>> step, detector.since
        (52, 48)
    """

    def __init__(
        self,
        planned: int | None = None,
        curves: int = 1,
        budget: float = 0.01,
        side: Side = "rise",
        transform: Transform = "log",
    ) -> None:
        super().__init__(planned, curves, budget, side, transform)
        self.threshold = cusum_threshold(self.points)
        """What the sum of the scores must reach."""
        self.armed_after, below = SHORT if (planned or PLANNED) <= SHORT_RUN else LONG
        self.freeze = max(self.threshold - below, 2 * (CAP - SLACK))
        """Sum above which the baseline is kept."""
        self._state = _State()

    @property
    def statistic(self) -> float:
        """The larger sum over the threshold: 1 or more is an alarm."""
        return max(self._state.sums) / self.threshold

    @property
    def since(self) -> int | None:
        """Step of the last point before the level shifted, as far as is known: the last where the sum was 0."""
        onset = self._state.onsets[self._larger]
        return onset if onset >= 0 else None

    @property
    def direction(self) -> Literal["rise", "fall"]:
        """Which way the level has shifted, if it has."""
        if self.side == "both":
            return "fall" if self._larger else "rise"
        return self.side

    def update(self, step: int, value: float) -> float:
        """Take another point in.

        Args:
            step: Step of the point.
            value: Of the curve. One that is not finite, or negative under a logarithm, is a gap: nothing is learned,
                and the next point has no score.

        Returns:
            The sum over its threshold: 1 or more is an alarm, 0 before the detector is armed.
        """
        state, y = self._state, transformed(value, self.transform)
        if isnan(y):
            state.last = nan
            return self.statistic
        armed, follows = state.count >= self.armed_after, not isnan(state.last)
        error = _prediction_error(state, y)
        if armed and follows:
            degrees = min(state.count, MEMORY) - 2
            self._accumulate(min(max(normal_score(error, _scale(state), degrees), -CAP), CAP))
        for index, total in enumerate(state.sums):
            if total == 0:
                state.onsets[index] = int(step)
        if armed and max(state.sums) > self.freeze:
            state.frozen += 1
        else:
            _learn(state, y, error, armed)
        state.last = y
        if state.frozen >= FROZEN:
            self._state = _State(onsets=[int(step), int(step)])
        return self.statistic

    def restart(self) -> None:
        """Forget the sums and the last point, with the same baseline: the next point does not follow the last."""
        self._state.sums, self._state.onsets = [0.0, 0.0], [-1, -1]
        self._state.last, self._state.frozen = nan, 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: numbers and lists, and ``None`` for a last value that is none."""
        return {**asdict(self._state), "last": none_for_nan(self._state.last)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        state = {name: copy(value) for name, value in state_dict.items()}
        self._state = _State(**{**state, "last": nan_for_none(state["last"])})

    @property
    def _larger(self) -> int:
        return int(self._state.sums[1] > self._state.sums[0])

    def _accumulate(self, score: float) -> None:
        """Add a score to the sums of the sides that count; the other stays 0."""
        sums = self._state.sums
        signs = {"rise": (1, 0), "fall": (0, -1), "both": (1, -1)}[self.side]
        for index, sign in enumerate(signs):
            if sign:
                total = max(0.0, sums[index] + sign * score - SLACK)
                sums[index] = min(2 * self.threshold, total)


def _prediction_error(state: _State, y: float) -> float:
    """How far a point is from its prediction; from the mean alone, where there is no point just before it."""
    deviation, count = y - state.mean, min(state.count, MEMORY)
    if isnan(state.last) or count < FEW or state.square <= 0:
        return deviation
    # the second term is for the bias of so few points
    phi = (count * state.product / state.square + 1) / (count - 3)
    return deviation - min(max(phi, 0.0), LARGEST_PHI) * (state.last - state.mean)


def _learn(state: _State, y: float, error: float, armed: bool) -> None:
    """Let a point into the mean, the autocorrelation and the variance."""
    deviation, before = y - state.mean, state.last - state.mean
    has_scale, scale = _has_scale(state, armed), sqrt(state.variance)
    bounded, wild = (_clipped(error, bound * scale) if has_scale else error for bound in (OUTLIER, WILD))
    if has_scale and state.square > 0:
        far = FAR * max(sqrt(state.square), _floor(state))
        deviation, before = _clipped(deviation, far), _clipped(before, far)
    if state.count >= 2 and not isnan(before):
        weight = max(1 / (state.count - 1), FORGET)
        state.variance += weight * (bounded * bounded - state.variance)
        state.pending += weight * (wild * wild - state.pending)
        if not any(state.sums):
            state.variance = state.pending
        state.product += weight * (deviation * before - state.product)
        state.square += weight * (before * before - state.square)
    state.mean += max(1 / (state.count + 1), FORGET) * deviation
    state.count, state.frozen = state.count + 1, 0


def _has_scale(state: _State, armed: bool) -> bool:
    """Whether it is known what is far: of a curve that starts as a constant not before it is armed."""
    return state.count >= FEW and (armed or state.variance > _floor(state) ** 2)


def _clipped(value: float, bound: float) -> float:
    """Between minus the bound and the bound; NaN stays NaN."""
    return value if isnan(value) else min(max(value, -bound), bound)


def _floor(state: _State) -> float:
    """Standard deviation that is rounding."""
    return 1e-6 * (1 + abs(state.mean))


def _scale(state: _State) -> float:
    """Standard deviation of the next error; behind a far point the error of the autocorrelation counts."""
    variance = max(state.variance, _floor(state) ** 2)
    if state.square > 0:
        leverage = (state.last - state.mean) ** 2 / state.square
        variance += state.variance * max(leverage - 1, 0.0) / min(state.count, MEMORY)
    return sqrt(variance)
