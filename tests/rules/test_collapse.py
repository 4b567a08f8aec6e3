"""Complete collapse, with the loss as a witness, and what is judged at all."""

import pytest

from lightning_collapse.rules import RULES, Judge, Task
from lightning_collapse.rules.collapse import DEEP, SHARE
from lightning_collapse.rules.history import Curve, Evidence
from lightning_collapse.rules.progress import EMBEDDED, LOSS, SURE
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY

TENTH, HUNDREDTH = DEEP / 2, SHARE / 2
"""Spreads below the one line and below the other."""
BEGINNING = 3
FALLING, FLAT = (lambda step: 0.9**step), (lambda step: 1.0)
SELF, ANY = Task("self-supervised"), Task()


def run(readings, loss=None, task=ANY, n=16, kind="complete_collapse", kept=None):
    """A healthy beginning, then these readings of layer ``z``."""
    judge = Judge([kind])
    for step in range(n):
        values = HEALTHY if step < BEGINNING else {**HEALTHY, **readings}
        points = [Point("collapse", "z", name, step, value, 64, 60.0) for name, value in values.items()]
        if loss is not None:
            points.append(Point("training", "", "loss", step, loss(step)))
        judgement = judge.update(points, task)
        if kept is not None:
            kept.append(judgement)
    return judge


def sinces(judge):
    return [verdict.since for verdict in judge.verdicts]


@pytest.mark.parametrize("name", ["relative_spread", "direction_spread"])
def test_a_tenth_is_a_failure_unless_the_loss_falls(name):
    kept = []
    assert sinces(run({name: TENTH})) == [BEGINNING]
    assert sinces(run({name: TENTH}, FALLING, kept=kept)) == []
    assert not kept[-1].healthy  # nor is it well
    assert sinces(run({name: TENTH}, FALLING, SELF, n=EMBEDDED + 3)) == [EMBEDDED - 1]  # its loss falls as it collapses
    assert sinces(run({name: TENTH}, lambda step: -FALLING(-step))) == []  # a loss below zero


@pytest.mark.parametrize("name", ["relative_spread", "direction_spread"])
def test_a_loss_that_does_not_fall_tells_from_the_eighth_point_on(name):
    assert sinces(run({name: TENTH}, FLAT)) == [SURE - 1]
    assert sinces(run({name: TENTH}, lambda step: 1.1**step)) == [SURE - 1]
    assert sinces(run({name: TENTH}, lambda step: 0.8 ** min(step, 5), n=40))  # it has stopped


@pytest.mark.parametrize("loss", [None, FALLING, FLAT])
@pytest.mark.parametrize("task", [ANY, SELF], ids=["unknown", "self-supervised"])
@pytest.mark.parametrize(
    "readings",
    [{"relative_spread": HUNDREDTH}, {"direction_spread": HUNDREDTH}, {"feature_std": HUNDREDTH}],
    ids=lambda readings: next(iter(readings)),
)
def test_a_hundredth_always_is(readings, task, loss):
    assert sinces(run(readings, loss, task)) == [BEGINNING]


@pytest.mark.parametrize(
    ("kind", "readings"),
    [
        ("complete_collapse", {"relative_spread": HUNDREDTH}),
        ("dimensional_collapse", {"effective_rank": 1.0, "eigenvalue_effective_rank": 1.0}),
    ],
)
def test_what_holds_little_by_design_and_outputs_that_follow_targets_are_not_judged(kind, readings):
    assert sinces(run(readings, kind=kind)) == [BEGINNING]
    for task in (Task(conditioning=frozenset({"z"})), Task("regression", outputs=frozenset({"z"}))):
        kept = []
        assert sinces(run(readings, task=task, kind=kind, kept=kept)) == []
        assert {tuple(judgement.severities) for judgement in kept} == {()}
    assert RULES[kind].applies_to("z", Task(conditioning=frozenset({"t"})))


def test_what_was_narrow_from_birth_is_let_be_while_it_learns():
    def narrow(value, loss):
        judge = Judge(["complete_collapse"])
        for step in range(16):
            readings = {**HEALTHY, "relative_spread": TENTH if step < BEGINNING else value}
            points = [Point("collapse", "z", name, step, of, 64, 60.0) for name, of in readings.items()]
            judge.update([*points, *([] if loss is None else [Point("training", "", "loss", step, loss(step))])])
        return sinces(judge)

    assert narrow(2 * SHARE, None) == narrow(2 * SHARE, FLAT) == []  # half of it is left
    assert narrow(HUNDREDTH, None) == [BEGINNING]
    assert narrow(HUNDREDTH, FALLING) == []
    assert narrow(HUNDREDTH, FLAT) == [SURE - 1]


@pytest.mark.parametrize("kind", ["complete_collapse", "dimensional_collapse"])
@pytest.mark.parametrize("task", [ANY, Task("classification"), Task("regression"), SELF], ids=str)
def test_what_was_narrow_from_birth_is_let_be_once_the_loss_has_halved_and_keeps_that(kind, task):
    """As the embedding of patches of one gray, in a network that has learned what there is."""
    narrow = {**HEALTHY, "relative_spread": HUNDREDTH, "eigenvalue_effective_rank": 1.0, "effective_rank": 1.0}
    if kind == "dimensional_collapse":
        narrow["relative_spread"] = 0.6

    def found(loss, beginning=narrow):
        judge = Judge([kind])
        for step in range(60):
            readings = beginning if step < BEGINNING else narrow
            points = [Point("collapse", "z", name, step, of, 64, 60.0) for name, of in readings.items()]
            judge.update([*points, Point("training", "", "loss", step, loss(step))], task)
        return len(judge.verdicts)

    learned = lambda step: 0.8 ** min(step, 10)  # noqa: E731
    assert found(learned) == (task == SELF)  # whose loss falls as it collapses
    assert found(lambda step: max(learned(step), 0.6))  # as far as frequencies of labels go
    assert found(lambda step: learned(step) if step < 40 else 0.9)  # it has lost what it had gained
    assert found(learned, HEALTHY)  # it was wide


@pytest.mark.parametrize(
    "ranks",
    [
        {"effective_rank": 1.5, "eigenvalue_effective_rank": 1.05},
        {name: 0.09 * HEALTHY[name] for name in ("effective_rank", "eigenvalue_effective_rank")},
    ],
    ids=["near one", "a tenth"],
)
def test_a_classifier_may_learn_one_direction_after_the_other(ranks):
    def found(loss, task):
        return sinces(run(ranks, loss, task, kind="dimensional_collapse"))

    named = [Task(name) for name in ("classification", "multi-label", "language model")]
    for task in [*named, Task(outputs=frozenset({"head"}))]:
        assert found(FALLING, task) == []
        assert found(None, task) == [BEGINNING]
        assert found(FLAT, task) == [SURE - 1]  # it may not have begun to learn
        assert found(lambda step: 1.1**step, task) == [BEGINNING]
        # it falls back to where it began
        assert found(lambda step: 1.0 if not step else 99 * 0.9**step, task) == [BEGINNING]
    assert found(FALLING, Task("regression")) == found(FALLING, ANY) == found(FALLING, SELF) == [BEGINNING]


CLASSES = Task("classification", last=frozenset({"z"}))
KINDS = {
    "complete_collapse": {"relative_spread": HUNDREDTH, "direction_spread": HUNDREDTH},
    "dimensional_collapse": {"eigenvalue_effective_rank": 1.1, "effective_rank": 1.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_that_has_not_begun_to_learn_has_a_while(kind):
    def judge(loss, task=CLASSES):
        return sinces(run(KINDS[kind], loss, task, n=100, kind=kind))

    [since] = judge(lambda step: 1 + 0.03 * (step % 2))  # batches differ
    assert since >= 40
    [since] = judge(lambda step: 4.6 - min(step, 3) / 3)  # as far as frequencies of tokens go, and no further
    assert since >= 40
    [since] = judge(lambda step: 1.0 if step < 20 else 1.4)  # it has got worse
    assert since <= 30
    [early] = judge(FLAT, Task("classification", last=frozenset({"head"})))  # layers before the last ones do not wait
    assert early <= SURE


def test_an_autoencoder_may_begin_with_one_mean_of_all_inputs():
    def judge(readings, loss, task):
        return sinces(run(readings, loss, task, n=100))

    one_code = {"relative_spread": 0.0, "direction_spread": 0.0}
    for name in ("reconstruction", "regression"):
        [since] = judge(one_code, lambda step: 1.0 - min(step, 3) / 9, Task(name))  # and no further
        assert (since >= 40) == (name == "reconstruction")
    [since] = judge(one_code, lambda step: 1.0 if step < 20 else 1.4, Task("reconstruction"))  # it has got worse
    assert since <= 30


@pytest.mark.parametrize("name", ["classification", "language model", "reconstruction"])
def test_features_that_spread_more_lie_in_a_cone_where_the_loss_sees_lengths(name):
    wider = {"feature_std": 3 * HEALTHY["feature_std"], "direction_spread": HUNDREDTH}
    loss = lambda step: 1.0 if step < 20 else 1.4  # noqa: E731
    assert sinces(run(wider, loss, Task(name), n=100)) == []
    assert sinces(run(wider, loss, SELF, n=100))
    assert sinces(run({"direction_spread": HUNDREDTH}, loss, Task(name), n=100))
    assert sinces(run({**wider, "relative_spread": HUNDREDTH}, loss, Task(name), n=100))


def test_severities_of_the_two_lines_are_ordered():
    kept = [[], [], []]
    for value, judgements in zip((2 * TENTH, TENTH, HUNDREDTH), kept, strict=True):
        run({"relative_spread": value}, FALLING, kept=judgements)
    found = [judgements[-1].severities["complete_collapse", "z"] for judgements in kept]
    assert found == sorted(found)
    assert found[1] < 1 <= found[2]


@pytest.mark.parametrize("layer", ["head", "block"])
def test_a_plateau_of_a_language_model_may_leave_few_directions_anywhere(layer):
    """It knows how frequent tokens are, and no more yet; a loss that has got worse is no plateau."""
    task, fallen = Task("language model", last=frozenset(["head"])), {"eigenvalue_effective_rank", "effective_rank"}

    def found(loss, planned=100):
        judge = Judge(["dimensional_collapse"])
        judge.planned = planned
        for step in range(60):
            share = 1.0 if step < BEGINNING else 0.08
            points = [Point("collapse", layer, name, step, share * 40, 64, 60.0) for name in fallen]
            judge.update([*points, Point("training", "", "loss", step, loss(step))], task)
        return sinces(judge)

    def plateau(step):
        return max(4.0 - 0.2 * step, 3.0)

    assert found(plateau) == []
    assert found(plateau, planned=40) == [27]  # most of the run is over
    assert found(lambda step: plateau(step) + 2 * (step > 20))


def test_advice_is_of_what_the_run_shows():
    rule, task = RULES["complete_collapse"], Task("classification")

    def advised(loss, task=task, baseline=HEALTHY):
        curve = Curve()
        for step in range(20):
            curve.update(step, loss(step))
        return rule.advise(Evidence("z", {}, baseline, {LOSS: curve}, task))

    assert advised(FLAT) == advised(FALLING) == rule.advice
    assert "Rollback" in advised(lambda step: 1.0 + step)  # it diverges
    assert advised(lambda step: 1.0 + step, Task()) == rule.advice  # a loss that is not known may rise
    assert "initialization" in advised(FLAT, baseline={**HEALTHY, "relative_spread": 1e-3})


def test_rows_that_point_one_way_are_not_said_to_lie_on_one_point():
    says = {
        name: [verdict.says for verdict in run({name: HUNDREDTH, **beside}).verdicts]
        for name, beside in (("relative_spread", {"direction_spread": HUNDREDTH}), ("direction_spread", {}))
    }
    assert says["relative_spread"] == ["All inputs are mapped to nearly one point in `z`."]
    assert says["direction_spread"] == ["All inputs point nearly one way in `z`."]
