"""When outputs and routers are said to have collapsed, and when not."""

import math
import random

import pytest

from lightning_collapse.rules import RULES, Judge, Task
from lightning_collapse.utilities.points import Point

RL, LANGUAGE = Task("reinforcement"), Task("language model")


def noisy(level, points, spread=0.1, seed=0):
    draw = random.Random(seed)
    return [level(t) * math.exp(spread * draw.gauss(0, 1)) for t in range(points)]


def judged(curve, task=RL, rules=("output_entropy_collapse",), planned=None):
    judge = Judge(None if rules is None else list(rules))
    judge.planned = planned or len(curve)
    for step, entropy in enumerate(curve):
        judge.update([Point("output", "policy", "entropy", step, entropy, n=512)], task)
    return judge


@pytest.mark.parametrize("points", [100, 300])
@pytest.mark.parametrize(
    "level", [lambda t: 1.0, lambda t: 0.3 + 0.7 * math.exp(-t / 20), lambda t: 0.15 + 0.85 * math.exp(-t / 10)]
)
def test_entropies_that_fall_as_they_should_are_no_failure(points, level):
    for seed in range(10):
        assert not judged(noisy(level, points, seed=seed)).verdicts


@pytest.mark.parametrize("points", [100, 300])
def test_a_collapse_is_said_with_its_onset_and_severity(points):
    for seed in range(5):
        judge = judged(noisy(lambda t: 1.0 if t < 0.7 * points else 0.02, points, seed=seed))
        [verdict] = judge.verdicts
        assert 0.7 * points - 10 <= verdict.since <= 0.7 * points + 1
        assert verdict.step <= 0.7 * points + 8
        assert verdict.severity == pytest.approx(5, rel=0.5)  # a tenth of the beginning over the level


def test_a_fall_that_stays_above_a_tenth_is_none_however_sure():
    assert not judged(noisy(lambda t: 1.0 if t < 70 else 0.2, 100, spread=0.01)).verdicts


@pytest.mark.parametrize(("points", "first"), [(38, 1), (300, 20)])
def test_what_was_gone_before_a_fall_could_be_seen_is_a_notice(points, first):
    def told(level):
        judge = Judge(["output_entropy_collapse"])
        judge.planned = points
        for step in range(points):
            judge.update([Point("output", "policy", "entropy", step, level(step), n=512, null=math.log(4))], RL)
        assert not judge.verdicts
        return [notice.since for notice in judge.notices]

    assert told(lambda t: 1.3 if t < first else 1e-4) == [first]
    assert not told(lambda t: 1.3 if t < first else 0.02)  # still explores
    assert not told(lambda t: 1e-4)  # never did


def test_a_log_partition_that_drifts_is_healthy_and_one_that_drifts_ever_faster_a_notice():
    for faster, expected in ((0.0, []), (0.1, ["head"])):
        judge = Judge(["log_partition_growth"])
        judge.planned = 60
        for step, value in enumerate(noisy(lambda t: 2 + 0.2 * t, 60, spread=0.02)):  # far above twice log V
            grown = value * math.exp(faster * max(step - 40, 0))
            judge.update([Point("output", "head", "log_z_rms", step, grown, n=512)], LANGUAGE)
        assert [notice.layer for notice in judge.notices] == expected
        assert all(38 <= notice.since <= 41 for notice in judge.notices)
        assert not judge.verdicts


def test_it_is_over_when_the_entropy_is_back():
    judge = judged(noisy(lambda t: 0.02 if 60 < t < 80 else 1.0, 120))
    assert len(judge.verdicts) == 1
    last = judge.update([Point("output", "policy", "entropy", 120, 1.0, n=512)], RL)
    assert not last.active


@pytest.mark.parametrize(
    ("task", "rules", "armed"),
    [
        (RL, None, True),
        (LANGUAGE, None, False),
        (Task(), None, False),
        (LANGUAGE, ["output_entropy_collapse"], True),
        (Task(), ["output_entropy_collapse"], True),
    ],
)
def test_it_judges_agents_and_what_it_is_asked_about(task, rules, armed):
    curve = noisy(lambda t: 1.0 if t < 70 else 0.02, 100)
    assert bool(judged(curve, task, rules).verdicts) is armed


HEAD = Task("classification", outputs=frozenset(["head"]))


def predicted(usage, labels=9.5, task=HEAD, points=40):
    judge = Judge(["prediction_collapse"])
    for step in range(points):
        judge.update([Point("output", "head", "usage", step, usage(step), n=128, null=labels)], task)
    return judge.verdicts


@pytest.mark.parametrize(
    ("usage", "given"),
    [
        (lambda t: 9.0, {}),
        (lambda t: min(1 + 0.3 * t, 9.0), {}),  # begins with one class, and leaves it
        (lambda t: 1.0 if t % 10 < 2 else 9.0, {}),  # two batches in ten are of one class
        (lambda t: 1.0, {"labels": 1.3}),  # and so are the labels
        (lambda t: 1.0, {"labels": math.nan}),
        (lambda t: 1.0, {"task": Task("classification", outputs=frozenset(["other"]))}),
        (lambda t: 1.0, {"task": Task("self-supervised", outputs=frozenset(["head"]))}),
        (lambda t: 1.0, {"points": 7}),
        (lambda t: 2.0, {}),
    ],
)
def test_predictions_of_several_classes_or_of_what_has_but_one_are_no_failure(usage, given):
    assert not predicted(usage, **given)


def test_one_class_for_all_is_said_since_its_beginning_and_severity_counts_from_one():
    for task in (HEAD, Task(outputs=frozenset(["head"])), Task("language model", outputs=frozenset(["head"]))):
        [verdict] = predicted(lambda t: 9.0 if t < 20 else 1.1, task=task)
        assert 20 <= verdict.since <= 22 <= verdict.step <= 26
        assert verdict.severity == pytest.approx(0.1 * 8.5 / 0.1)


def test_no_other_rule_waits_to_be_asked():
    assert [kind for kind, rule in RULES.items() if rule.unasked] == ["output_entropy_collapse"]


def router(used, dead=0.0, n=2048, experts=8, k=1, cv2=None, loss=None):
    judge = Judge(["router_collapse"])
    for step, load in enumerate(used):
        null = (experts - k) / (k * n)
        unfair = experts / load - 1 if cv2 is None else cv2
        values = {"effective_experts": load, "load_cv2": unfair, "experts_per_token": float(k), "dead": dead}
        points = [Point("router", "gate", name, step, x, n, null) for name, x in values.items()]
        points += [] if loss is None else [Point("training", "", "loss", step, loss(step))]
        judge.update(points)
    return judge


def test_a_fair_router_an_uneven_one_and_one_that_spreads_are_no_failure():
    assert not router([7.9] * 20).verdicts
    assert not router([5.0] * 20).verdicts
    assert not router([1.5 + 0.3 * step for step in range(20)]).verdicts
    assert not router([7.9] * 5 + [3.0] * 15, n=32).verdicts  # as uneven as chance may have it


def test_a_collapse_of_the_load_is_said():
    [verdict] = router([7.9] * 5 + [2.0] * 5).verdicts
    assert (verdict.kind, verdict.since, verdict.step) == ("router_collapse", 5, 6)
    [verdict] = router([2.0] * 6, k=2).verdicts  # every token has the same two, from the beginning
    assert verdict.since == 0


def test_idle_experts_are_said_where_tokens_are_many_enough_to_tell():
    assert router([5.5] * 6, dead=2.0).verdicts
    assert not router([5.5] * 6, dead=1.0).verdicts
    assert not router([5.5] * 6, dead=2.0, n=128).verdicts  # sixteen for each would be fair


def test_idle_experts_of_a_loss_that_keeps_what_it_gained_are_a_notice():
    judge = router([5.5] * 20, dead=3.0, loss=lambda step: 1 / (1 + step))
    assert not judge.verdicts
    assert [notice.kind for notice in judge.notices] == ["router_collapse"]
