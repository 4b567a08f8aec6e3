"""Partial collapse of joint embeddings and prototype collapse, on planted curves; lines are read from the rules."""

from math import nan

import pytest

from lightning_collapse.rules import RULES, Judge, Task
from lightning_collapse.rules.partial import MANY, POINTS, SHARE
from lightning_collapse.utilities.points import Point

PARTIAL, PROTOTYPES = RULES["partial_collapse"], RULES["prototype_collapse"]
SELF = Task("self-supervised")
NULL = 60.0
LOW = NULL * PARTIAL.line / 4
"""A rank that is far below the line as long as recall stays where it was."""
HIGH = 4 * LOW / PARTIAL.fallen
"""A beginning from which that is far enough a fall."""
FIRST, PATIENCE = POINTS, PARTIAL.patience
"""Points without which nothing is said in a short run, and points in a row that it takes from there."""
SHORT = int(FIRST / SHARE)


def uneven(value, step, share=0.01):
    return value * (1 + share * (7 * step % 5 - 2))


def run(ranks, recalls, task=SELF, chance=1 / 192, layer="z", planned=SHORT):
    """The judgement of every point; recall is not drawn where it is ``None``."""
    judge, found = Judge([PARTIAL.kind]), []
    judge.planned = planned
    for step, (rank, recall) in enumerate(zip(ranks, recalls, strict=True)):
        points = [Point("collapse", layer, PARTIAL.measures[0], step, uneven(rank, step), 192, NULL)]
        if recall is not None:
            points.append(Point("views", layer, "recall_at_1", step, uneven(recall, step), 192, chance))
        found.append(judge.update(points, task))
    return judge, found


def fallen(n=24, start=3):
    return [HIGH] * start + [LOW] * (n - start)


def test_a_low_rank_that_has_fallen_and_an_idle_recall_are_a_failure():
    judge, found = run(fallen(), [0.5] * 24)
    [verdict] = judge.verdicts
    assert (verdict.kind, verdict.layer) == ("partial_collapse", "z")
    assert (verdict.since, verdict.step) == (FIRST - 1, FIRST + PATIENCE - 2)
    assert verdict.severity >= 1
    assert [judgement.severities["partial_collapse", "z"] for judgement in found[: FIRST - 1]] == [0.0] * (FIRST - 1)
    assert f"isotropic noise reads {NULL:.0f}" in verdict.evidence
    assert "one view finds the other in 50 % of the cases" in verdict.evidence
    assert "chance does in 0.5 %" in verdict.evidence


@pytest.mark.parametrize(
    ("planned", "first"), [(1, POINTS), (SHORT, POINTS), (50, round(SHARE * 50)), (1000, MANY), (None, None)]
)
def test_nothing_is_said_before_a_share_of_the_planned_points(planned, first):
    judge, _ = run(fallen(80), [0.5] * 80, planned=planned)
    [verdict] = judge.verdicts
    assert verdict.since == first - 1 if first else POINTS <= verdict.since <= MANY


def test_what_has_come_back_is_let_be_though_it_rises_no_more():
    judge, found = run([HIGH] * 3 + [LOW / 2] * 6 + [LOW] * 31, [0.5] * 40)
    assert judge.verdicts == []
    assert PARTIAL.healthy <= found[-1].severities["partial_collapse", "z"] < 1


@pytest.mark.parametrize(
    ("ranks", "recalls"),
    [
        (fallen(), [0.5 * 1.03**step for step in range(24)]),
        ([HIGH] * 3 + [LOW * 1.03**step for step in range(21)], [0.5] * 24),
    ],
    ids=["recall", "rank"],
)
def test_what_rises_is_let_be(ranks, recalls):
    judge, found = run(ranks, recalls)
    assert judge.verdicts == []
    assert PARTIAL.healthy <= found[-1].severities["partial_collapse", "z"] < 1


@pytest.mark.parametrize(
    ("ranks", "recalls"),
    [
        ([HIGH] * 24, [0.5] * 24),
        ([HIGH, *[HIGH / 8] * 8, *[HIGH / 2] * 27], [0.2, *[0.6] * 35]),  # it falls to an eighth, and recovers
        ([LOW] * 24, [0.5] * 24),  # it never had more, and never learned
        ([HIGH] * 3 + [HIGH / 2] * 21, [0.1] * 3 + [0.9] * 21),
    ],
    ids=["high", "recovers", "never more", "learns"],
)
def test_healthy_joint_embeddings(ranks, recalls):
    judge, found = run(ranks, recalls)
    assert judge.verdicts == []
    assert all(judgement.severities["partial_collapse", "z"] < 1 for judgement in found)


@pytest.mark.parametrize(("candidates", "verdicts"), [(16, 0), (31, 0), (32, 1), (192, 1)])
def test_few_candidates_tell_nothing(candidates, verdicts):
    judge, _ = run(fallen(), [0.5] * 24, chance=1 / candidates)
    assert len(judge.verdicts) == verdicts


@pytest.mark.parametrize("chance", [nan, 0.0])
def test_nor_does_a_recall_whose_chance_is_not_known(chance):
    assert run(fallen(), [0.5] * 24, chance=chance)[0].verdicts == []


def test_recall_of_an_untrained_network_counts_as_chance_at_least():
    judge, _ = run(fallen(), [1e-9] * 3 + [1 / 192] * 21)
    assert len(judge.verdicts) == 1


@pytest.mark.parametrize(
    ("embeddings", "verdicts"), [((), 1), (("z",), 1), (("projector",), 0)], ids=["unknown", "it", "another"]
)
def test_layers_that_the_loss_compares_with_each_other(embeddings, verdicts):
    judge, found = run(fallen(), [0.5] * 24, Task("self-supervised", embeddings=frozenset(embeddings)))
    assert len(judge.verdicts) == verdicts
    assert bool(found[-1].severities) == bool(verdicts)


def test_it_takes_views():
    judge, found = run(fallen(), [None] * 24)
    assert judge.verdicts == []
    assert found[-1].healthy
    late, _ = run(fallen(30), [None] * 10 + [0.5] * 20)
    assert [verdict.since for verdict in late.verdicts] == [10 + FIRST - 1]


def test_other_tasks_are_judged_by_other_rules():
    assert "partial_collapse" not in Judge().rules_for(Task("classification"))
    assert run(fallen(), [0.5] * 24, Task("classification"))[0].verdicts == []


def test_it_is_over_once_the_rank_is_back():
    judge, found = run([*fallen(), *[HIGH] * 16], [0.5] * 40)
    assert len(judge.verdicts) == 1
    over = [judgement.step for judgement in found if judgement.recovered]
    assert len(over) == 1
    assert 24 + PATIENCE <= over[0] <= 24 + PATIENCE + 4
    assert not found[-1].is_active("partial_collapse")


def choose(perplexities, null, loss=None, task=SELF):
    judge = Judge([PROTOTYPES.kind])
    for step, value in enumerate(perplexities):
        points = [Point("collapse", "prototypes", "assignment_perplexity", step, value, 64, null)]
        if loss is not None:
            points.append(Point("training", "", "loss", step, loss(step)))
        judge.update(points, task)
    return judge


def test_one_expert_may_be_enough_while_the_loss_comes_to_no_harm():
    regression = Task("regression")
    judge = choose([1.0] * 24, 31.0, lambda step: 0.9**step, regression)
    assert judge.verdicts == []
    assert [(notice.kind, notice.since) for notice in judge.notices] == [("prototype_collapse", POINTS - 1)]
    harmed = choose([1.0] * 32, 31.0, lambda step: 0.9**step if step < 20 else 1.0, regression)
    assert [verdict.since for verdict in harmed.verdicts] == [22]
    assert choose([1.0] * 24, 31.0, None, regression).verdicts
    assert choose([1.0] * 24, 31.0, lambda step: 0.9**step).verdicts  # features that are compared with each other


def test_one_prototype_for_all_is_a_failure_from_the_sixteenth_point_on():
    [verdict] = choose([1.0] * 24, 31.0).verdicts
    assert (verdict.kind, verdict.layer, verdict.since) == ("prototype_collapse", "prototypes", POINTS - 1)
    assert verdict.step == POINTS - 1 + PROTOTYPES.patience - 1
    assert "over 64 rows the perplexity of the choices is 1.0, where equally likely ones read 31.0" in verdict.evidence


@pytest.mark.parametrize(
    ("perplexities", "null"),
    [
        ([9.0] * 24, 36.0),
        ([1.1 * 1.05**step for step in range(24)], 31.0),  # they come into use
        ([1.0] * 24, PROTOTYPES.least_null),  # a router of few experts
        ([1.0] * (POINTS - 1) + [20.0] * 12, 31.0),
        ([1.0] * 24, nan),
    ],
    ids=["nine of 36", "recovering", "few", "late", "no null"],
)
def test_what_only_looks_like_a_collapse_of_prototypes(perplexities, null):
    assert choose(perplexities, null).verdicts == []
