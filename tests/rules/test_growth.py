"""Explosions by growth: a norm that grows faster than it did, while the loss rises."""

import json
from math import nan

import pytest

from lightning_collapse.rules import RULES, Judge
from lightning_collapse.rules.growth import Growth
from lightning_collapse.utilities.points import Point

START, LENGTH = 60, 100
CURVES = [True, False]


def norm(step, grows=True):
    """A slow growth, and from :data:`START` on a fast one."""
    return 3.0 * 1.003**step * (1.1 ** max(step - START, 0) if grows else 1.0)


def loss(step, rises=True):
    return 2.0 * (1 + 0.02 * (7 * step % 5 - 2)) * (1.15 ** max(step - START, 0) if rises else 1.0)


def points(step, grows, rises):
    values = {"sign_diversity": 0.6, "spectral_norm": norm(step, grows)}
    of_matrix = {"sign_diversity": 0.5, "spectral_norm": 1.0}
    found = [
        Point("spectral_alignment", layer, name, step, value, 64)
        for layer, readings in (("all", values), ("fc1", of_matrix))
        for name, value in readings.items()
    ]
    return [*found, Point("training", "", "loss", step, loss(step, rises))]


def run(judge, steps, grows=True, rises=True):
    return [judge.update(points(step, grows, rises)) for step in steps]


def new(planned=LENGTH):
    judge = Judge(["loss_explosion"])
    judge.planned = planned
    return judge


def test_growth_that_quickens_while_the_loss_rises_is_told_soon():
    judge = new()
    run(judge, range(LENGTH))
    verdict = judge.verdicts[0]
    assert (verdict.kind, verdict.layer) == ("loss_explosion", "fc1")
    assert START < verdict.step <= START + 8
    assert norm(verdict.step) < RULES["loss_explosion"].growth * norm(0)  # before the norms alone would tell


def test_after_training_was_turned_back_healthy_points_are_healthy():
    judge = new()
    steps = iter(range(LENGTH))
    while not judge.verdicts:
        run(judge, [next(steps)])
    judge.restart()
    found = run(judge, steps, False, False)
    assert len(judge.verdicts) == 1
    assert found
    assert all(judgement.healthy for judgement in found)


@pytest.mark.parametrize(("grows", "rises"), [(True, False), (False, True), (False, False)])
def test_neither_growth_nor_a_rising_loss_alone(grows, rises):
    judge = new()
    # until the norm has doubled: from there on it would be for the signs to tell
    found = run(judge, range(START + 7), grows, rises)
    assert judge.verdicts == []
    assert all(judgement.severities.get(("loss_explosion", "all"), 0) < 1 for judgement in found)


def test_without_the_loss_nothing_is_told_by_growth():
    judge = new()
    for step in range(LENGTH):
        judge.update([point for point in points(step, True, True) if point.family != "training"])
    assert judge.verdicts == []


@pytest.mark.parametrize("planned", [LENGTH, None])
@pytest.mark.parametrize("cut", [1, 19, START, START + 2])
def test_a_resumed_run_tells_it_at_the_same_point(planned, cut):
    whole = run(new(planned), range(LENGTH))
    first, second = new(planned), Judge(["loss_explosion"])
    run(first, range(cut))
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.planned == planned
    assert run(second, range(cut, LENGTH)) == whole[cut:]
    run(first, range(cut, LENGTH))
    assert second.state_dict() == first.state_dict()


def test_a_new_run_has_new_detectors():
    judge = new()
    run(judge, range(LENGTH))
    judge.reset()
    assert judge.planned is None
    assert judge.state_dict()["detectors"] == judge.state_dict()["history"] == []


def test_growth_reads_rates_and_takes_what_is_no_positive_number_for_a_gap():
    growth, other = Growth(LENGTH), Growth(LENGTH)
    for step in range(50):
        assert growth.update(step, norm(step)) == other.update(step, 1e6 * norm(step)) == 0
    before = growth.state_dict()
    for bad in (nan, 0.0, -1.0, float("inf")):
        assert growth.update(50, bad) == 0
    after = growth.state_dict()
    assert after["before"] is None
    assert after["detector"]["last"] is None
    assert {**after["detector"], "last": 0} == {**before["detector"], "last": 0}
    resumed = Growth(LENGTH)
    resumed.load_state_dict(json.loads(json.dumps(after, allow_nan=False)))
    assert resumed.state_dict() == after
    # the first point after a gap has no rate, the second has no point before it to be predicted from
    assert [growth.update(step, norm(step)) for step in (51, 52)] == [0, 0]
