"""Points and why they deserve doubt."""

from math import isnan

from lightning_collapse.utilities.points import Flag, Point


def test_flags_are_numbers_that_keep_their_order() -> None:
    order = ["OK", "SKETCHED", "NONFINITE", "CONSTANT", "FEW_ROWS", "SOLVER", "NOT_CALLED", "UNCONVERGED"]
    assert [flag.name for flag in sorted(Flag)] == order
    assert float(Flag.OK) == 0.0
    assert not Flag.OK


def test_defaults() -> None:
    point = Point("collapse/net/effective_rank", 3, 1.5)
    assert (point.n, point.flag) == (0, Flag.OK)
    assert isnan(point.null)
