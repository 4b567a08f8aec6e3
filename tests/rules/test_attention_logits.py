"""Logits that grow faster than they did, and logits above the bound they are scaled to."""

import json

import pytest

from lightning_collapse.rules import Judge
from lightning_collapse.utilities.points import Point

START, LENGTH = 60, 100


def points(step, rate):
    grown = 4.0 * (1 + 0.01 * (7 * step % 5 - 2)) * 1.004**step * (1 + rate) ** max(step - START, 0)
    readings = {"a": 1.0, "b": grown, "all": grown}
    return [Point("attention", layer, "max_logit", step, value) for layer, value in readings.items()]


def judged(rate, planned=LENGTH, resumed=None):
    judge = Judge(["attention_logit_growth"])
    judge.planned = planned
    for step in range(LENGTH):
        if step == resumed:
            state = json.loads(json.dumps(judge.state_dict()))
            judge = Judge(["attention_logit_growth"])
            judge.planned = planned
            judge.load_state_dict(state)
        judge.update(points(step, rate))
    return judge


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_growth_that_quickens_is_told_with_its_layer_and_its_onset(rate):
    [verdict] = judged(rate).verdicts
    assert (verdict.kind, verdict.layer) == ("attention_logit_growth", "b")
    assert START - 4 <= verdict.since <= START + 1 < verdict.step <= START + 10
    assert "QKClip" in verdict.advice


def test_steady_growth_is_healthy():
    judge = judged(0.0)
    assert not judge.verdicts
    assert not judge.notices


def test_a_resumed_judge_says_the_same():
    assert judged(0.1, resumed=START + 2).verdicts == judged(0.1).verdicts


@pytest.mark.parametrize(("share", "verdicts", "notices"), [(0.0, 1, 0), (0.25, 0, 1)])
def test_above_the_bound_is_a_failure_unless_it_is_scaled_back(share, verdicts, notices):
    judge = Judge(["attention_logit_limit"])
    for step in range(5):
        values = {"over_tau": 0.5 + 0.4 * step, "clipped_share": share if step > 1 else 0.0}
        judge.update([Point("qk_clip", "encoder", name, step, value) for name, value in values.items()])
    assert len(judge.verdicts) == verdicts
    assert len(judge.notices) == notices
