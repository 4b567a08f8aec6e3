"""One reading of one curve: what a monitor publishes, and what loggers, the guard and the dashboard read."""

from enum import IntEnum
from math import nan
from typing import NamedTuple


class Flag(IntEnum):
    """Why a reading deserves doubt; logged as the curve ``{family}/{layer}/flag``. Up to 6 the larger is the graver."""

    OK = 0
    SKETCHED = 1
    """The layer is wider than ``max_dim``; the value describes a random projection of it."""
    NONFINITE = 2
    """Some rows held NaN or infinity and were left out."""
    CONSTANT = 3
    """All rows are equal: there is no spectrum to speak of, ranks read 0."""
    FEW_ROWS = 4
    """Fewer than two usable rows: the value is NaN."""
    SOLVER = 5
    """No eigenvalue solver converged: the value is NaN."""
    NOT_CALLED = 6
    """The layer did not run in the window: the value is NaN."""
    UNCONVERGED = 7
    """The direction that the value refers to is not known well enough yet, or is not defined: the matrix's top singular
    values are too close, it changed too much since the last point, or it is zero or not finite (the value is NaN)."""


class Point(NamedTuple):
    """One reading of one curve.

    Attributes:
        key: Name of the curve, ``{family}/{layer}/{measure}``.
        step: Lightning's logging step, the x-axis of the curve.
        value: The reading; NaN where there is none.
        n: Number of rows behind it, over all processes; 0 where it does not apply.
        null: What isotropic noise with this ``n`` and width would read; NaN where there is no null.
        flag: Why the reading deserves doubt.
    """

    key: str
    step: int
    value: float
    n: int = 0
    null: float = nan
    flag: Flag = Flag.OK
