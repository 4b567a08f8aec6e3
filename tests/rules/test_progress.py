"""Progress of a loss in closed form, and curves that a resumed run goes on from."""

import json
from math import nan

import pytest

from lightning_collapse.rules import Task
from lightning_collapse.rules.history import Curve, Evidence, History
from lightning_collapse.rules.progress import EMBEDDED, LOSS, SURE, is_harmed, learns
from lightning_collapse.utilities.points import Point

ONE = [1.0] * 16


def evidence(values, task=""):
    curve = Curve()
    for step, value in enumerate(values or ()):
        curve.update(step, value)
    return Evidence("z", {}, {}, {} if values is None else {LOSS: curve}, Task(task))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, False),
        ([1.0] * (SURE - 1), True),  # too few to tell
        ([1.0] * SURE, False),
        ([1.0] * 8 + [0.96] * 8, False),  # by a twentieth at least
        ([1.0] * 8 + [0.94] * 8, True),
        ([1.0] * 8 + [1.5] * 8, False),
        ([-1.0] * 8 + [-1.04] * 8, False),
        ([-1.0] * 8 + [-1.06] * 8, True),
        ([-1.0] * 8 + [-0.9] * 8, False),
        ([0.0] * 8 + [-1.0] * 8, True),
        ([1.0] * 30 + [0.5] * 16, False),  # it did, once
        ([1.0] * 8 + [nan] * 30, False),
    ],
)
def test_whether_it_learns(values, expected):
    assert learns(evidence(values)) == expected
    early = values is not None and sum(value == value for value in values) < EMBEDDED
    assert learns(evidence(values, "self-supervised")) == early


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, True),
        ([1.0] * (SURE - 1), False),  # too few to tell
        (ONE, True),  # it has never gained anything
        ([1.0] + [0.96] * 15, True),
        ([1.0] + [0.5] * 15, False),
        ([1.0] + [0.5] * 10 + [0.54] * 5, False),  # a tenth of what it had gained is 0.05
        ([1.0] + [0.5] * 10 + [0.56] * 5, True),
        ([1.0] + [0.5] * 10 + [9.0] * 2, False),  # of five points two are outliers
        ([-1.0] + [-3.0] * 10 + [-2.81] * 5, False),
        ([-1.0] + [-3.0] * 10 + [-2.79] * 5, True),
        ([1.0] + [-1.0] * 10 + [-0.81] * 5, False),
        ([1.0] + [-1.0] * 10 + [-0.79] * 5, True),
        ([0.0] + [-1.0] * 15, False),
        ([1.0] + [0.5] * 10 + [0.9] * 5 + [0.5] * 5, False),  # it has come back
    ],
)
def test_whether_it_is_harmed(values, expected):
    assert is_harmed(evidence(values)) == expected
    assert is_harmed(evidence(values, "self-supervised"))


def test_a_curve_knows_its_beginning_its_level_and_its_lowest():
    curve = Curve()
    for step, value in enumerate([8.0, 5.0, nan, 1.0, 5.0, 4.0, 4.2, 100.0]):
        curve.update(step, value)
    assert (curve.count, curve.first, curve.level) == (7, 8.0, 4.2)
    assert curve.lowest == 4.2  # of the medians 8, 6.5, 5, 5, 5, 4.2, 4.2


def test_a_curve_goes_on_to_the_bit():
    values = [2.3 * 0.97**step + 0.1 * (7 * step % 5) for step in range(40)]
    values[11] = nan
    for cut in (0, 1, 5, 12, 30):
        whole, half, resumed = Curve(), Curve(), Curve()
        for step, value in enumerate(values):
            whole.update(step, value)
            if step < cut:
                half.update(step, value)
        resumed.load_state_dict(json.loads(json.dumps(half.state_dict(), allow_nan=False)))
        assert resumed.state_dict() == half.state_dict()
        for step in range(cut, 40):
            resumed.update(step, values[step])
        assert resumed.state_dict() == whole.state_dict()
        assert (resumed.slope, resumed.error, resumed.level, resumed.drop) == (
            whole.slope,
            whole.error,
            whole.level,
            whole.drop,
        )


def test_a_history_keeps_what_is_followed_and_goes_on():
    followed = {("collapse", "rank"), ("training", "loss")}
    history = History()
    for step in range(20):
        points = [Point("collapse", layer, "rank", step, 1.0 + step * i) for i, layer in enumerate(("a", "b"))]
        points += [Point("collapse", "a", "std", step, 1.0), Point("training", "", "loss", step, 0.9**step)]
        history.update([*points, Point("views", "a", "rank", step, nan)], followed)
    of_b = history.of("b", [("collapse", "rank"), ("training", "loss"), ("views", "recall")])
    assert list(of_b) == [("collapse", "rank"), ("training", "loss")]
    assert of_b["collapse", "rank"].level == 18.0
    assert history.of("a", [("collapse", "std"), ("views", "rank")]) == {}
    again = History()
    again.load_state_dict(json.loads(json.dumps(history.state_dict(), allow_nan=False)))
    assert again.state_dict() == history.state_dict()
    assert again.of("b", [("training", "loss")])["training", "loss"].drop == of_b["training", "loss"].drop
    again.clear()
    assert again.state_dict() == []


def test_states_of_curves_without_a_value_are_equal_and_valid():
    history = History()
    history.update([Point("training", "", "loss", 0, nan)], {("training", "loss")})
    again = History()
    again.load_state_dict(json.loads(json.dumps(history.state_dict(), allow_nan=False)))
    assert again.state_dict() == history.state_dict()
