"""Robust trend (Theil-Sen): how fast the last points of a curve rise or fall, and how sure that is."""

from collections.abc import Mapping
from itertools import combinations, pairwise
from math import isnan, nan, sqrt
from statistics import median
from typing import Any, Literal

from lightning_collapse.rules.scores import NORMAL_MAD, Transform, check_choices, transformed

Direction = Literal["rising", "falling", "flat"]
FEWEST = 6
"""Points below which residuals tell nothing of noise."""
EFFICIENCY = 0.91
"""Variance of the slope of least squares over that of Theil and Sen, for Gaussian noise at evenly spaced steps."""


class Trend:
    r"""Slope of the last points of a curve with its standard error; state and time grow with the window alone.

    The slope is the median of the slopes of all pairs of points [1, 2], which an outlier in four does not move. Its
    error is that of least squares for the noise of the residuals,

    .. math:: \operatorname{se} = \frac{1.48\,\operatorname{MAD}}{\sqrt{0.91\,S}} \sqrt{\frac{m}{m - 2}}
        \sqrt{\frac{1 + \hat\varphi}{1 - \hat\varphi}}, \qquad S = \sum_t (t - \bar t)^2,

    with their lag-1 autocorrelation, clipped to between 0 and 0.9 and corrected for the bias of so few points: of 16
    points of noise with an autocorrelation of 0, 0.5, 0.9 its root mean square is 1.25, 1.4, 1.1 of the spread of the
    slopes, and two errors call 7, 14, 26 % of them a trend, three 2, 6, 15 %, Student-t(3) noise no more. A trend is a
    statement about the window, not about the run: judged again at every point it will cross any line some time, and it
    has no budget of false alarms; :class:`~lightning_collapse.rules.Detector` has.

    Args:
        window: How many last points count, at least 6.
        transform: Scale of the slope: ``"log"`` gives a share per step and leaves negative values out, ``"logit"`` is
            for fractions, ``"identity"`` keeps the units.

    References:
        [1] Theil, *A rank-invariant method of linear and polynomial regression analysis*, 1950.
        [2] Sen, *Estimates of the regression coefficient based on Kendall's tau*, JASA 1968.

    Example:
        >>> trend = Trend(transform="identity")
        >>> for step in range(16):
        ...     trend.update(step, 3.0 + 0.5 * step + 0.1 * (-1) ** step)
        >>> round(trend.slope, 2), trend.direction()
        (0.5, 'rising')
    """

    def __init__(self, window: int = 16, transform: Transform = "log") -> None:
        if window < FEWEST:
            raise ValueError(f"`window` must be at least {FEWEST} points, and is {window}.")
        check_choices("both", transform)
        self.window = window
        self.transform = transform
        self._line: tuple[float, float] | None = None  # where somebody has asked since the last point
        self._steps: list[int] = []
        self._values: list[float] = []

    def update(self, step: int, value: float) -> None:
        """Take another point in; one that is not finite, or not after the last, is left out."""
        y = transformed(value, self.transform)
        if isnan(y) or (self._steps and step <= self._steps[-1]):
            return
        self._steps = [*self._steps, int(step)][-self.window :]
        self._values = [*self._values, y][-self.window :]
        self._line = None

    @property
    def slope(self) -> float:
        """Median slope per step, on the scale of ``transform``; NaN before 6 points."""
        return self._fit()[0]

    @property
    def error(self) -> float:
        """Standard error of the slope; NaN before 6 points, 0 on a straight line."""
        return self._fit()[1]

    def direction(self, z: float = 2.0) -> Direction:
        """Which way the curve goes: flat if the slope is within ``z`` errors of zero, or not known."""
        if not abs(self.slope) > z * self.error:
            return "flat"
        return "rising" if self.slope > 0 else "falling"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"steps": list(self._steps), "values": list(self._values)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._steps, self._values = list(state_dict["steps"]), list(state_dict["values"])
        self._line = None

    def _fit(self) -> tuple[float, float]:
        """Slope and error of the points in the window."""
        if self._line is None:
            self._line = _fitted(self._steps, self._values)
        return self._line


def _fitted(steps: list[int], values: list[float]) -> tuple[float, float]:
    m = len(steps)
    if m < FEWEST:
        return nan, nan
    points = list(zip(steps, values, strict=True))
    slope = median((y - x) / (t - s) for (s, x), (t, y) in combinations(points, 2))
    tilted = [y - slope * t for t, y in points]
    center = median(tilted)
    residuals = [y - center for y in tilted]
    noise = NORMAL_MAD * median(map(abs, residuals)) * sqrt(m / (m - 2))
    mean = sum(steps) / m
    spread = sum((t - mean) ** 2 for t in steps)
    phi = _autocorrelation(residuals)
    return slope, noise / sqrt(EFFICIENCY * spread) * sqrt((1 + phi) / (1 - phi))


def _autocorrelation(residuals: list[float]) -> float:
    """At lag 1, with the correction for the bias of so few residuals of a line; between 0 and 0.9."""
    m, power = len(residuals), sum(r * r for r in residuals)
    if power <= 0 or m <= 7:
        return 0.0
    raw = sum(r * s for r, s in pairwise(residuals)) / power
    return min(max((m * raw + 2) / (m - 4), 0.0), 0.9)
