"""Points and why they deserve doubt."""

from math import isnan

from lightning_collapse.utilities.points import Flag, Point, curve_part


def test_flags_are_numbers_that_keep_their_order() -> None:
    order = ["OK", "SKETCHED", "NONFINITE", "CONSTANT", "FEW_ROWS", "SOLVER", "NOT_CALLED", "UNCONVERGED", "LEFT_OUT"]
    assert [flag.name for flag in sorted(Flag)] == order
    assert float(Flag.OK) == 0.0
    assert not Flag.OK


def test_defaults() -> None:
    point = Point("collapse", "net", "effective_rank", 3, 1.5)
    assert (point.n, point.flag) == (0, Flag.OK)
    assert isnan(point.null)
    assert isnan(point.error)


def test_a_curve_is_named_by_what_there_is() -> None:
    assert Point("collapse", "net.0:input", "n", 0, 1.0).key == "collapse/net.0:input/n"
    assert Point("guard", "", "complete_collapse", 0, 1.0).key == "guard/complete_collapse"


def test_names_of_layers_stay_apart_and_open_no_folder() -> None:
    names = ["\u7f16\u7801", "\u89e3\u7801", "a/b", "a<b>", "a|b|", "a_b_", "plain.0", "x:input"]
    parts = [curve_part(name) for name in names]
    assert len(set(parts)) == len(names)
    assert all(part.isascii() and "/" not in part for part in parts)
    assert parts[-2:] == names[-2:]
