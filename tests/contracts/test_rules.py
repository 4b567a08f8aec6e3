"""What every registered rule promises."""

import io
import json
import random
import re
from functools import cache
from math import inf, isnan, nan

import pytest
import torch

import lightning_collapse
from lightning_collapse import callbacks, layers, losses, optimizers, penalties
from lightning_collapse.rules import ALL, RULES, TASKS, TRAINING, Judge, Rule, Task
from lightning_collapse.rules.history import Evidence, History
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import CURVES, MEASURES

PUBLIC = (lightning_collapse, callbacks, layers, losses, optimizers, penalties)
OF_TRAINING = {"nonfinite", "loss"}
PLANNED = 20
NULLS = {"views/recall_at_1": 1 / 64, "load_cv2": 1 / 64}
"""Nulls of curves that are no ranks."""
rules = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
WITH_HISTORY = {kind: rule for kind, rule in RULES.items() if type(rule).weigh is not Rule.weigh}
"""Rules that read more than the latest points."""
WITH_LEVELS = {kind: rule for kind, rule in WITH_HISTORY.items() if not rule.informative}
"""Of these, those that judge a level: a notice has no severity that a judge would tell."""


def judge_of(rule):
    """Of a run that is planned short enough for every rule to have its say."""
    judge = Judge([rule.kind])
    judge.planned = PLANNED
    return judge


def task_of(rule):
    """One that it judges layers of: unknown, or with outputs that are compared with classes."""
    plain = Task()
    known = any(rule.applies_to(layer, plain) for layer in (ALL, "z"))
    return plain if known else Task("classification", outputs=frozenset(["y", "z"]))


def read(rule):
    return [*rule.measures, *rule.optional]


def names(rule):
    """All that it reads, by the names that it has for it."""
    of_training = [f"{TRAINING}/{name}" for name in rule.of_training]
    return list(dict.fromkeys([*read(rule), *rule.follows, *of_training]))


def make_points(rule, values, step=0, n=1000, null=30.0, layer=None, flag=Flag.OK):
    where = layer or (ALL if rule.applies_to(ALL, Task()) else "z")
    points = []
    for name, value in values.items():
        family, _, measure = name.rpartition("/")
        own = "" if family == TRAINING else where
        noise = NULLS.get(name, null) if null > 0 else null
        points.append(Point(family or rule.family, own, measure, step, value, n, noise, flag))
    return points


def by_name(rule, points):
    """As the judge hands them over."""
    families = {rule.family, TRAINING}
    return {(p.measure if p.family in families else f"{p.family}/{p.measure}"): p for p in points}


@cache
def share(rule, name):
    """Whether it declares a range of 0 to 1."""
    curve = CURVES.get(name if "/" in name else f"{rule.family}/{name}") or MEASURES[name]
    return re.match(r"0 to 1\b", curve.range) is not None


def draw_one(rule, name, random_):
    """A reading in the range that it declares, at times at an end; an estimate of zero is none."""
    if name.startswith(f"{TRAINING}/"):
        return random_.uniform(0.1, 3) if name.endswith("/loss") else float(random_.random() < 0.5)
    top = 1.0 if share(rule, name) else random_.choice([1.0, 3.0, 40.0])
    return random_.choice([1e-4, top]) if random_.random() < 0.1 else random_.uniform(0.001, top)


def draw(rule, random_):
    """Readings of one point."""
    return {name: draw_one(rule, name, random_) for name in names(rule)}


@rules
def test_kind_family_and_measures_are_well_formed_and_known(rule):
    assert re.fullmatch("[a-z]+(_[a-z]+)*", rule.kind)
    assert type(rule).__doc__.strip()
    known = {curve.name for curve in CURVES.values() if curve.family == rule.family}
    known |= {measure.curve for measure in MEASURES.values() if measure.family == rule.family}
    of_others = {name for name in CURVES if not name.startswith(f"{rule.family}/")}
    of_others |= {f"{TRAINING}/{name}" for name in OF_TRAINING}
    assert rule.measures
    assert set(rule.measures) <= known
    assert set(rule.optional) <= known | of_others
    assert set(rule.follows) <= known | of_others
    assert len(set(read(rule))) == len(read(rule))
    assert len(set(rule.follows)) == len(rule.follows)
    assert set(rule.of_training) <= OF_TRAINING
    assert set(rule.tasks) <= set(TASKS)
    assert set(rule.supersedes) <= set(RULES) - {rule.kind}
    assert 0 < rule.healthy < 1
    assert all(number is None or number >= 1 for number in (rule.patience, rule.recovery, rule.calibration))
    assert set(rule.detectors("z", None)) <= {*read(rule), *rule.of_training}


@rules
def test_it_says_what_to_do_and_where_it_comes_from(rule):
    assert re.search(r"\b(19|20)\d\d\b", rule.paper)
    assert rule.informative != bool(rule.advice)
    assert rule.informative or re.fullmatch(r"[A-Z].*[^.]\.", rule.advice)
    named = re.findall(r"(?<![\w.])[A-Z]\w+(?=[(`])", rule.advice)
    assert rule.informative or named
    for name in named:
        assert any(name in module.__all__ for module in PUBLIC), name


@rules
def test_it_says_in_one_plain_sentence_what_is_wrong_and_where(rule):
    assert re.fullmatch(r"[A-Z`][^.]*`\{layer\}`[^.]*\.", rule.says)
    assert rule.says.count("{") == 1
    assert len(rule.says) <= 90
    assert rule.kind.replace("_", " ") not in rule.says.lower()  # which comes next


@pytest.mark.parametrize("kind", ["loss_spike", "divergence_ahead", "non_finite_step", "skipped_steps"])
def test_no_module_is_named_where_none_stands_out(kind):
    whole, of_layer = RULES[kind].sentence(ALL), RULES[kind].sentence("encoder")
    assert re.fullmatch(r"[A-Z][^.`]*\.", whole)
    assert of_layer.startswith(whole[:-1])
    assert "`encoder`" in of_layer


@rules
def test_points_that_are_no_numbers_change_nothing_and_raise_nothing(rule):
    judge, random_ = judge_of(rule), random.Random(0)
    for step in range(24):
        judge.update(make_points(rule, draw(rule, random_), step), task_of(rule))
    before = judge.state_dict()
    for step in range(24, 28):
        judgement = judge.update(make_points(rule, dict.fromkeys(names(rule), nan), step, n=0, null=nan), task_of(rule))
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
    judge, step = judge_of(rule), 0
    for own in (1.0, *[value] * 8, 1.0):
        for null in (nan, 0.0, 30.0):
            # a warning fails
            judge.update(make_points(rule, dict.fromkeys(names(rule), own), step, null=null, flag=flag), task_of(rule))
            step += 1


@rules
@pytest.mark.parametrize("value", [0.0, 1e-320, 1e300, -1e300])
def test_no_beginning_raises(rule, value):
    judge = judge_of(rule)
    for step in range(40):
        own = dict.fromkeys(names(rule), value if step < 20 else 1.0)
        judge.update(make_points(rule, own, step, null=(30.0, nan)[step % 2]), task_of(rule))


def of_own(rule, name):
    """The name of a reading of the training as :func:`make_points` takes it."""
    return f"{TRAINING}/{name}" if name in rule.of_training else name


@rules
def test_severity_is_monotone_in_what_it_reads(rule):
    assert {*rule.lower_is_worse, *rule.higher_is_worse}
    assert not set(rule.lower_is_worse) & set(rule.higher_is_worse)
    assert {*rule.lower_is_worse, *rule.higher_is_worse} <= {*read(rule), *rule.of_training}
    random_, severities = random.Random(0), set()
    for _ in range(4000):
        baseline = {name: draw_one(rule, name, random_) for name in read(rule)}
        n, null = random_.choice([40, 1000]), random_.choice([nan, 3.0, 30.0])
        points = by_name(rule, make_points(rule, draw(rule, random_), n=n, null=null))
        for directed in (*rule.lower_is_worse, *rule.higher_is_worse):
            point, other = points[directed], draw_one(rule, of_own(rule, directed), random_)
            found = [
                rule.severity({**points, directed: point._replace(value=value)}, baseline)
                for value in worse_last(rule, directed, point.value, other)
            ]
            assert not found[0] > found[1] * (1 + 1e-12), (directed, points, baseline)
            severities |= {value for value in found if not isnan(value)}
    if severities == {0.0}:  # nothing is told by one point
        assert rule.kind in WITH_HISTORY
        return
    assert min(severities) < rule.healthy
    assert max(severities) >= 1


def worse_last(rule, name, *values):
    return sorted(values, reverse=name in rule.lower_is_worse)


@pytest.mark.parametrize("rule", WITH_LEVELS.values(), ids=list(WITH_LEVELS))
def test_runs_that_stay_at_worse_values_are_never_less_severe(rule):
    """Both begin alike, and then stay where they are, the loss as it may."""
    random_, severities = random.Random(0), set()
    first = int(rule.calibration) if rule.calibration not in (None, inf) else 3
    for _ in range(50):
        start, values = draw(rule, random_), draw(rule, random_)
        losses = [random_.choice([1.0, 0.9]) ** step for step in range(first + 18)]
        n, null = random_.choice([40, 1000]), random_.choice([3.0, 30.0])
        for directed in (*rule.lower_is_worse, *rule.higher_is_worse):
            name, found = of_own(rule, directed), []
            for value in worse_last(rule, directed, values[name], draw_one(rule, name, random_)):
                judge = judge_of(rule)
                if rule.detectors("z", None) or rule.detectors(ALL, None):
                    judge.planned = None  # in long runs they are not armed yet: they tell changes, and not levels
                for step, loss in enumerate(losses):
                    readings = {**(start if step < first else {**values, name: value})}
                    readings |= {key: loss for key in readings if key == f"{TRAINING}/loss"}
                    judgement = judge.update(make_points(rule, readings, step, n, null), task_of(rule))
                found.append(judgement.severities[judgement_place(judgement)])
            assert not found[0] > found[1] * (1 + 1e-12), (name, start, values)
            severities |= set(found)
    if severities == {0.0}:  # no level is told of, but its change, by a detector that is not armed in so few points
        assert rule.detectors(ALL, None)
        return
    assert min(severities) < rule.healthy
    assert max(severities) >= 1


def judgement_place(judgement):
    [place] = judgement.severities
    return place


@rules
def test_a_restored_judge_goes_on_as_if_uninterrupted(rule):
    random_ = random.Random(0)
    sick = [dict.fromkeys(read(rule), value) for value in (0.001, 0.999)]
    script = [draw(rule, random_) for _ in range(25)]
    script += [{**draw(rule, random_), **random_.choice(sick)} for _ in range(12)]

    def run(judge, steps):
        return [judge.update(make_points(rule, script[step], step), task_of(rule)) for step in steps]

    whole = run(judge_of(rule), range(len(script)))
    for cut in (1, 3, 21, 30):
        judge, again, file = judge_of(rule), judge_of(rule), io.BytesIO()
        run(judge, range(cut))
        torch.save(judge.state_dict(), file)
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))
        assert run(again, range(cut, len(script))) == whole[cut:]
        assert again.state_dict() == (run(judge, range(cut, len(script))), judge.state_dict())[1]
        json.dumps(again.state_dict()["history"] + again.state_dict()["detectors"], allow_nan=False)


def evidence_of(rule, script, null=30.0):
    """What the judge hands to a rule after these points."""
    history, layer = History(), make_points(rule, script[0])[0].layer
    detectors = dict(rule.detectors(layer, None))
    for step, values in enumerate(script):
        points = make_points(rule, values, step, null=null, layer=layer)
        history.update(points, rule.followed)
        for name, detector in detectors.items():
            detector.update(step, by_name(rule, points)[name].value)
    curves = history.of(layer, rule.followed)
    named = {name: curves[key] for name, key in zip(rule.follows, rule.followed, strict=True)}
    baseline = {name: script[0][name] for name in read(rule)}
    return Evidence(layer, by_name(rule, points), baseline, named, task_of(rule), detectors)


@rules
def test_evidence_is_words_without_the_closing_dot(rule):
    random_ = random.Random(0)
    for _ in range(50):
        evidence = evidence_of(rule, [draw(rule, random_) for _ in range(2)])
        for words in (rule.evidence(evidence.points, evidence.baseline), rule.tell(evidence)):
            assert words
            assert "\n" not in words
            assert not words.endswith(".")
        assert not rule.excuse(evidence).endswith(".")
