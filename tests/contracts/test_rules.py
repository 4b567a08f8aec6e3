"""What every registered rule promises."""

import io
import random
import re
from math import inf, isnan, nan

import pytest
import torch

import lightning_collapse
from lightning_collapse import callbacks, layers, losses, optimizers, penalties
from lightning_collapse.rules import ALL, RULES, TASKS, Judge, Task
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import CURVES, MEASURES

PUBLIC = (lightning_collapse, callbacks, layers, losses, optimizers, penalties)
OF_TRAINING = {"nonfinite"}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


def read(rule):
    return [*rule.measures, *rule.optional]


def make_points(rule, values, step=0, n=1000, null=30.0, layer=None, flag=Flag.OK):
    where = layer or (ALL if rule.applies_to(ALL, Task()) else "z")
    return [
        Point("training" if name in rule.of_training else rule.family, "" if name in rule.of_training else where, name,
              step, value, n, null, flag)
        for name, value in values.items()
    ]  # fmt: skip


def draw(rule, random_):
    """Readings of one point in the range that each declares, some at its ends; an estimate of zero is none."""
    readings = {name: float(random_.random() < 0.5) for name in rule.of_training}
    for name in read(rule):
        curve = CURVES.get(f"{rule.family}/{name}") or MEASURES[name]
        top = 1.0 if re.match(r"0 to 1\b", curve.range) else random_.choice([1.0, 3.0, 40.0])
        readings[name] = random_.choice([0.001, top]) if random_.random() < 0.1 else random_.uniform(0.001, top)
    return readings


@rules
def test_kind_family_and_measures_are_well_formed_and_known(rule):
    assert re.fullmatch("[a-z]+(_[a-z]+)*", rule.kind)
    assert type(rule).__doc__.strip()
    known = {curve.name for curve in CURVES.values() if curve.family == rule.family}
    known |= {measure.curve for measure in MEASURES.values()} if rule.family == "collapse" else set()
    assert rule.measures
    assert set(read(rule)) <= known
    assert len(set(read(rule))) == len(read(rule))
    assert set(rule.of_training) <= OF_TRAINING
    assert set(rule.tasks) <= set(TASKS)
    assert set(rule.supersedes) <= set(RULES) - {rule.kind}
    assert 0 < rule.healthy < 1
    assert all(number is None or number >= 1 for number in (rule.patience, rule.recovery, rule.calibration))


@rules
def test_it_says_what_to_do_and_where_it_comes_from(rule):
    assert re.search(r"\b(19|20)\d\d\b", rule.paper)
    assert rule.informative != bool(rule.advice)
    assert rule.informative or re.fullmatch(r"[A-Z].*[^.]\.", rule.advice)
    names = re.findall(r"(?<![\w.])[A-Z]\w+(?=[(`])", rule.advice)
    assert rule.informative or names
    for name in names:
        assert any(name in module.__all__ for module in PUBLIC), name


@rules
def test_points_that_are_no_numbers_change_nothing_and_raise_nothing(rule):
    judge, random_ = Judge([rule.kind]), random.Random(0)
    for step in range(4):
        judge.update(make_points(rule, draw(rule, random_), step))
    before = judge.state_dict()
    for step in range(4, 8):
        judgement = judge.update(make_points(rule, dict.fromkeys(read(rule), nan), step, n=0, null=nan))
        assert judgement.judged == (rule.kind,)
        assert judgement.new == judgement.recovered == judgement.notices == ()
        assert not judgement.healthy or rule.informative
    after = judge.state_dict()
    assert before.pop("grouper").keys() >= after.pop("grouper").keys()  # a group may close
    assert after == before


@rules
@pytest.mark.parametrize("flag", [Flag.NOT_CALLED, Flag.FEW_ROWS, Flag.SOLVER, Flag.CONSTANT, Flag.NONFINITE])
@pytest.mark.parametrize("value", [0.0, 1.0, inf, -inf, 1e-320, 1e300, nan])
def test_no_reading_raises(rule, value, flag):
    judge = Judge([rule.kind])
    for own in (1.0, value, value, 1.0):
        for null in (nan, 0.0, 30.0):
            judge.update(make_points(rule, dict.fromkeys(read(rule), own), null=null, flag=flag))  # a warning fails


@rules
def test_severity_is_monotone_in_what_it_reads(rule):
    directed = {*rule.lower_is_worse, *rule.higher_is_worse}
    assert directed
    assert not set(rule.lower_is_worse) & set(rule.higher_is_worse)
    assert directed <= {*read(rule), *rule.of_training}
    random_, severities = random.Random(0), set()
    for _ in range(4000):
        baseline = {name: value for name, value in draw(rule, random_).items() if name in read(rule)}
        n, null = random_.choice([40, 1000]), random_.choice([nan, 3.0, 30.0])
        values = draw(rule, random_)
        for name in directed:
            pair = sorted([values[name], draw(rule, random_)[name]])
            milder, worse = pair if name in rule.higher_is_worse else reversed(pair)
            found = [
                rule.severity({p.measure: p for p in make_points(rule, {**values, name: v}, n=n, null=null)}, baseline)
                for v in (milder, worse)
            ]
            assert not found[0] > found[1] * (1 + 1e-12), (name, milder, worse, values, baseline)
            severities |= {value for value in found if not isnan(value)}
    assert min(severities) < rule.healthy
    assert max(severities) >= 1


@rules
def test_a_restored_judge_goes_on_as_if_uninterrupted(rule):
    random_ = random.Random(0)
    sick = [dict.fromkeys(read(rule), value) for value in (0.001, 0.999)]
    script = [draw(rule, random_) for _ in range(25)]
    script += [{**draw(rule, random_), **random_.choice(sick)} for _ in range(12)]

    def run(judge, steps):
        return [judge.update(make_points(rule, script[step], step)) for step in steps]

    whole = run(Judge([rule.kind]), range(len(script)))
    for cut in (1, 3, 21, 30):
        judge, again, file = Judge([rule.kind]), Judge([rule.kind]), io.BytesIO()
        run(judge, range(cut))
        torch.save(judge.state_dict(), file)
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))
        assert run(again, range(cut, len(script))) == whole[cut:]
        assert again.state_dict() == (run(judge, range(cut, len(script))), judge.state_dict())[1]


@rules
def test_evidence_is_words_without_the_closing_dot(rule):
    random_ = random.Random(0)
    for _ in range(50):
        values = draw(rule, random_)
        points = {point.measure: point for point in make_points(rule, values)}
        words = rule.evidence(points, {name: values[name] for name in read(rule)})
        assert words
        assert "\n" not in words
        assert not words.endswith(".")
