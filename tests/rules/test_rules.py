"""Verdicts of every family on planted curves: what is a failure, what only looks like one, and where it shows."""

from collections.abc import Callable, Mapping, Sequence

import pytest
from lightning.pytorch import Callback

from lightning_collapse import CollapseGuard
from lightning_collapse.reporting import publish
from lightning_collapse.rules import RULES, Judge, Judgement, Rule, Verdict, register_rule
from lightning_collapse.utilities.points import Point
from tests.toys import Claims, PointKeeper, Toy, batches, fit

Script = Sequence[Mapping[str, Mapping[str, float]]]


class Planted(Callback):
    """Publishes readings ``{layer: {measure: value}}`` of one family, one point per step."""

    def __init__(self, family: str, script: Script, n: int) -> None:
        self.family, self.script, self.n = family, script, n

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        points = [
            Point(self.family, layer, name, batch_idx, value, self.n)
            for layer, values in self.script[batch_idx].items()
            for name, value in values.items()
        ]
        publish(trainer, pl_module, points)


def judged(family: str, script: Script, n: int = 64) -> tuple[CollapseGuard, PointKeeper]:
    guard, keeper = CollapseGuard(action="log"), PointKeeper()
    monitor = Claims(family)
    fit(Toy(), [monitor, guard, Planted(family, script, n), keeper], batches(len(script)), log_every_n_steps=1)
    return guard, keeper


def diversity(mean: float, norm: float = 2.0, **of_layers: float) -> dict[str, dict[str, float]]:
    values = {**of_layers, "all": mean}
    return {layer: {"sign_diversity": value, "spectral_norm": norm} for layer, value in values.items()}


def test_one_sided_inputs_of_all_matrices_announce_an_explosion() -> None:
    healthy, ill = diversity(0.6, fc1=0.9, fc2=0.2), diversity(0.25, 4.1, fc1=0.3, fc2=0.19)
    guard, keeper = judged("spectral_alignment", [healthy] * 20 + [ill] * 3)
    [verdict] = guard.verdicts
    assert (verdict.kind, verdict.layer, verdict.since, verdict.step) == ("loss_explosion", "fc1", 20, 20)
    assert "is 0.25 in the mean over all matrices, where the run began with 0.60" in verdict.evidence
    assert "the largest spectral norm of a matrix 4.1, where it began with 2" in verdict.evidence
    assert [point.value for point in keeper.curve("guard/loss_explosion")] == [0.0] * 20 + [1.0] * 3
    assert not keeper.curve("guard/complete_collapse")


def test_one_point_is_enough_for_an_explosion_but_not_to_be_over_it():
    ill, better = diversity(0.25, 4.1), diversity(0.6)
    guard, keeper = judged("spectral_alignment", [diversity(0.6)] * 20 + [ill, better] * 3 + [better] * 2)
    assert len(guard.verdicts) == 1
    assert [point.value for point in keeper.curve("guard/loss_explosion")][20:] == [1.0] * 6 + [0.0] * 2


@pytest.mark.parametrize(
    "script",
    [
        [diversity(0.6, fc1=0.9)] * 20 + [diversity(0.5, 9.0, fc1=0.0)] * 4,  # single matrices touch zero all the time
        [diversity(0.6), *[diversity(0.1, 9.0)] * 3] + [diversity(0.6)] * 20,  # a warm-up
        [diversity(0.0)] * 20 + [diversity(0.0, 9.0)] * 2,
        [diversity(0.02)] * 20 + [diversity(0.0, 9.0)] * 3,
        [diversity(0.1)] * 20 + [diversity(0.1, 9.0)] * 4,  # one-sided from the beginning, as after a ReLU
        [diversity(0.6)] * 20 + [diversity(float("nan"), 9.0)] * 5,
        [diversity(0.6)] * 20 + [diversity(0.1, 3.9)] * 4,  # a small network, whose weights stay small
        [diversity(0.6)] * 20 + [diversity(0.6, 9.0)] * 4,  # weights that grow, and inputs on both sides
    ],
)
def test_what_only_looks_like_an_explosion_gets_no_verdict(script: Script) -> None:
    guard, _ = judged("spectral_alignment", script)
    assert guard.verdicts == []


def test_a_few_rows_may_fall_to_one_side_by_chance() -> None:
    script = [diversity(0.6)] * 20 + [diversity(0.1, 9.0)] * 4
    assert judged("spectral_alignment", script, n=31)[0].verdicts == []
    assert judged("spectral_alignment", script, n=32)[0].verdicts != []


def attention(entropy: float, collapsed: float = 0.0, overloaded: float = 0.0) -> dict[str, dict[str, float]]:
    values = {"entropy_mean": entropy, "collapsed_share": collapsed, "overloaded_share": overloaded, "max_logit": 9.0}
    return {"attn": values, "all": values}


SHARP = ([attention(0.9)] * 10 + [attention(0.08)] * 8, "attention_entropy_collapse", 10)
COLLAPSED = ([attention(0.9)] * 10 + [attention(0.5, collapsed=0.5)] * 8, "attention_entropy_collapse", 10)
OVERLOADED = ([attention(0.99, 0, 1)] + [attention(0.6)] * 9 + [attention(0.98, 0, 1)] * 9, "attention_overload", 10)
ATTENTION = pytest.mark.parametrize(("script", "kind", "since"), [SHARP, COLLAPSED, OVERLOADED])


def attend(script: Script, loss: Callable[[int], float] | None = None) -> tuple[Judge, list[Judgement]]:
    """Verdicts without a trainer, where the loss is known or not."""
    judge, found = Judge([rule.kind for rule in RULES.values() if rule.family == "attention"]), []
    for step, layers in enumerate(script):
        points = [
            Point("attention", layer, name, step, value, 64)
            for layer, values in layers.items()
            for name, value in values.items()
        ]
        if loss is not None:
            points.append(Point("training", "", "loss", step, loss(step)))
        found.append(judge.update(points))
    return judge, found


def places(verdicts: Sequence[Verdict]) -> list[tuple[str, str, int]]:
    return [(verdict.kind, verdict.layer, verdict.since) for verdict in verdicts]


@ATTENTION
def test_attention_that_looks_at_one_key_or_at_all_alike(script: Script, kind: str, since: int) -> None:
    judge, _ = attend(script)
    assert places(judge.verdicts) == [(kind, "attn", since)]
    assert "over 64 queries" in judge.verdicts[0].evidence
    assert judge.notices == []


@ATTENTION
def test_it_is_a_notice_while_the_loss_comes_to_no_harm(script: Script, kind: str, since: int) -> None:
    judge, found = attend(script, lambda step: 0.97**step)
    assert judge.verdicts == []
    assert places(judge.notices) == [(kind, "attn", since)]
    assert "the loss has come to no harm" in judge.notices[0].evidence
    assert judge.notices[0].advice == ""
    assert all(judgement.healthy for judgement in found)


@ATTENTION
def test_it_is_a_verdict_once_the_loss_is_harmed(script: Script, kind: str, since: int) -> None:
    """Its level is the median of five points, so the third high one tells."""
    judge, _ = attend(script, lambda step: 0.95**step if step < since else 0.9)
    [verdict] = judge.verdicts
    assert (verdict.kind, verdict.layer, verdict.since) == (kind, "attn", since + 2)
    assert verdict.advice


@ATTENTION
def test_it_is_a_verdict_where_nothing_was_ever_learned(script: Script, kind: str, since: int) -> None:
    judge, _ = attend(script, lambda step: 2.3)
    assert places(judge.verdicts) == [(kind, "attn", since)]


def test_before_the_eighth_point_nobody_knows_whether_anything_is_learned() -> None:
    judge, _ = attend([attention(0.9)] * 3 + [attention(0.08)] * 4, lambda step: 2.3)
    assert judge.verdicts == []
    assert [notice.since for notice in judge.notices] == [3]


def test_a_guard_tells_the_loss() -> None:
    guard, _ = judged("attention", [attention(0.9)] * 4 + [attention(0.08)] * 3)
    assert guard.verdicts == []
    assert places(guard.notices) == [("attention_entropy_collapse", "attn", 4)]


@pytest.mark.parametrize(
    "script",
    [
        [attention(0.99, 0, 1)] * 8,  # freshly initialized heads
        [attention(0.99, 0, 1)] * 3 + [attention(0.3, collapsed=0.25)] * 5,
        [attention(0.99, 0, 1)] * 3 + [attention(0.9, 0, 0.5)] * 3 + [attention(0.97, 0, 0.9)] * 6,
        [attention(0.99, 0, 1)] * 3 + [attention(0.94)] * 3 + [attention(0.96, 0, 1)] * 6,  # about the line
        [attention(0.99, 0, 1)] * 3 + [attention(0.6)] * 3 + [attention(0.98, 0, 1)] * 4 + [attention(0.6)] * 3,
    ],
)
def test_what_attention_does_in_healthy_runs_gets_no_verdict(script: Script) -> None:
    judge, _ = attend(script)
    assert judge.verdicts == judge.notices == []


@pytest.mark.parametrize(("away", "kept"), [(2, 0), (3, 1)])
def test_overload_after_a_few_other_batches_is_a_notice(away: int, kept: int) -> None:
    judge, _ = attend([attention(0.99, 0, 1)] * 6 + [attention(0.9)] * away + [attention(0.98, 0, 1)] * 12)
    assert len(judge.verdicts) == kept
    assert len(judge.notices) == 1 - kept


def test_a_rule_of_ones_own_is_judged_too() -> None:
    class TooLow(Rule):
        """Below a tenth."""

        kind = "too_low"
        family = "attention"
        measures = ("entropy_mean",)

        def severity(self, points, beginning):
            return 0.1 / points["entropy_mean"].value

        def evidence(self, points, beginning):
            return "it is low"

    register_rule(TooLow)
    try:
        guard, _ = judged("attention", [attention(0.3)] * 2 + [attention(0.05)] * 2)
    finally:
        del RULES["too_low"]
    assert [verdict.kind for verdict in guard.verdicts] == ["too_low"]
    assert str(guard.verdicts[0]) == "Too low in `attn` since step 2, noticed at step 3: it is low."
