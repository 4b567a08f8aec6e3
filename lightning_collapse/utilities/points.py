"""Point: one reading of one curve; what a monitor publishes, and loggers, the guard and the dashboard read."""

import re
from enum import IntEnum
from functools import lru_cache
from math import nan
from typing import NamedTuple


class Flag(IntEnum):
    """Why a reading deserves doubt; logged as the curve ``{family}/{layer}/flag``. Up to 6 the larger is the graver.

    Example:
        >>> Flag.OK == 0, Flag(4).name
        (True, 'FEW_ROWS')
    """

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
    LEFT_OUT = 8
    """Some rows were left out: the loss compared them with other labels than those of the batch, as with mixup, or
    there was no room for all their classes."""


class Point(NamedTuple):
    """One reading of one curve.

    Attributes:
        family: First part of the curve's name, such as ``"collapse"``, or ``"val/collapse"`` of validation batches.
        layer: What was read; ``"all"`` for what sums up all layers of a family, empty for the run as a whole.
        measure: Last part of the curve's name.
        step: Lightning's logging step, the x-axis of the curve.
        value: The reading; NaN where there is none.
        n: Number of rows behind it, over all processes; 0 where it does not apply.
        null: What isotropic noise with this ``n`` and width would read; NaN where there is no null.
        flag: Why the reading deserves doubt.
        error: Standard error of the reading; NaN where it is not known.
        drawn: Whether loggers are given it, and not only those who read points.

    Example:
        >>> Point("collapse", "encoder", "effective_rank", step=50, value=3.2, n=256, null=30.0).key
        'collapse/encoder/effective_rank'
    """

    family: str
    layer: str
    measure: str
    step: int
    value: float
    n: int = 0
    null: float = nan
    flag: Flag = Flag.OK
    error: float = nan
    drawn: bool = True

    @property
    def key(self) -> str:
        """Name of the curve, ``{family}/{layer}/{measure}``, in characters that every logger keeps apart."""
        return "/".join(part for part in (self.family, curve_part(self.layer), self.measure) if part)


@lru_cache(maxsize=65536)
def curve_part(layer: str) -> str:
    """The name of a layer as a part of a curve's name: what loggers would replace is written as its code point.

    TensorBoard turns every character that it does not know into the same underscore, MLflow refuses it, and a slash
    would open a folder.

    Example:
        >>> curve_part("encoder.0"), curve_part("\u7de8\u78bc"), curve_part("a/b")
        ('encoder.0', '-7de8-78bc-', 'a-2f-b')
    """
    return _FOREIGN.sub(lambda found: "".join(f"-{ord(c):x}" for c in found[0]) + "-", layer)


_FOREIGN = re.compile(r"[^A-Za-z0-9_.: -]+")
