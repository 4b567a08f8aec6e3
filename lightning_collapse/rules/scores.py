"""Normal scores of curves, and the thresholds that a budget of false alarms gives them."""

from math import copysign, isfinite, isnan, log, log1p, nan, sqrt
from statistics import NormalDist
from typing import Literal, get_args

Side = Literal["rise", "fall", "both"]
Transform = Literal["log", "logit", "identity"]

PLANNED = 1000
"""Points of a run of unknown length."""
LEAST = 20.0
"""Points to a false alarm below which there is no threshold."""
NORMAL_MAD = 1.4826
"""Standard deviations of Gaussian noise per median absolute deviation."""


class Budgeted:
    """What has a budget of false alarms per healthy run.

    Args:
        planned: Points of a whole run; ``None`` for unknown, which counts as 1,000.
        curves: How many curves share the budget.
        budget: Allowed false alarms per healthy run, over all the curves.
        side: Whether a rise, a fall, or both count.
        transform: Scale where noise is even.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, planned: int | None, curves: int, budget: float, side: Side, transform: Transform) -> None:
        check_choices(side, transform)
        self.side = side
        self.transform = transform
        self.points = false_alarm_points(planned, curves, budget) * (2 if side == "both" else 1)
        """Points on average to a false alarm of one side of this curve."""


def cusum_threshold(points: float, slack: float = 0.5) -> float:
    r"""Threshold of a one-sided CUSUM that standard normal scores cross once in so many points, on average.

    .. math:: h = \frac{\ln(2 k^2 \operatorname{ARL}_0)}{2 k} - 1.166

    Siegmund's approximation (1985, *Sequential Analysis*). A Markov chain says 0.04 more at 335 points, 0.02 more at
    931, 0.01 at 18,960.

    Args:
        points: Average run length to a false alarm, :math:`\operatorname{ARL}_0`.
        slack: The reference value :math:`k`, in standard deviations.

    Example:
        >>> round(cusum_threshold(1e5), 2)
        9.65
    """
    return log(2 * slack**2 * points) / (2 * slack) - 1.166


def false_alarm_points(planned: int | None, curves: int, budget: float) -> float:
    """Points on average to a false alarm of one curve, for a budget of false alarms per run (union bound).

    Args:
        planned: Points of a whole run; ``None`` counts as 1,000.
        curves: How many curves share the budget.
        budget: Allowed false alarms per healthy run, over all the curves.
    """
    if not (0 < budget <= 0.5 and curves >= 1 and (planned is None or planned >= 1)):
        raise ValueError(
            f"`budget` must be in (0, 0.5], `curves` and `planned` at least 1, and are {budget}, {curves}, {planned}."
        )
    return max((planned or PLANNED) * curves / budget, LEAST)


def point_threshold(points: float) -> float:
    """Threshold that one standard normal score in so many exceeds, on average.

    Args:
        points: Average number of points to a false alarm.

    Example:
        >>> round(point_threshold(1e5), 3)
        4.265
    """
    return -NormalDist().inv_cdf(1 / points)


def normal_score(error: float, scale: float, degrees: float) -> float:
    r"""Normal deviate as unlikely as an error over its estimated scale is under Student's t (Wallace, 1959).

    .. math:: z \approx \operatorname{sign}(e)\, \frac{8\nu + 1}{8\nu + 3} \sqrt{\nu \ln(1 + e^2 / (\nu s^2))}

    For scores up to 3 it is off by 0.0022 at 14 degrees of freedom and by 0.0001 at 62.

    Args:
        error: Of a prediction, :math:`e`.
        scale: Root of the mean square of earlier errors, :math:`s > 0`.
        degrees: Degrees of freedom of the scale, :math:`\nu`.
    """
    root = sqrt(degrees * log1p(error * error / (degrees * scale * scale)))
    return copysign((8 * degrees + 1) / (8 * degrees + 3) * root, error)


def transformed(value: float, transform: Transform) -> float:
    """Value on the scale where noise is even, NaN if it is not finite or negative where a logarithm is taken."""
    value = float(value)
    if not isfinite(value):
        return nan
    if transform == "logit":
        share = min(max(value, 1e-6), 1 - 1e-6)
        return log(share / (1 - share))
    if transform == "log":
        return log(max(value, 1e-12)) if value >= 0 else nan
    return min(max(value, -1e100), 1e100)


def check_choices(side: str, transform: str) -> None:
    """Raise if there is no such side or transform."""
    if side not in get_args(Side) or transform not in get_args(Transform):
        raise ValueError(
            f"`side` is one of {get_args(Side)}, `transform` one of {get_args(Transform)}, not {side!r}, {transform!r}."
        )


def none_for_nan(value: float) -> float | None:
    """The value, or ``None`` where there is none: states are to be equal to themselves, and valid JSON.

    Example:
        >>> none_for_nan(nan), none_for_nan(2.0)
        (None, 2.0)
    """
    return None if isnan(value) else value


def nan_for_none(value: float | None) -> float:
    """The reverse of :func:`none_for_nan`."""
    return nan if value is None else value
