"""Planted curves of two intrinsic dimensions: when features are poorer than targets, and when they only seem so."""

from collections.abc import Sequence
from math import exp, nan, sqrt

import pytest
from lightning.pytorch import Callback

from lightning_collapse import CollapseGuard
from lightning_collapse.reporting import publish
from lightning_collapse.rules import Judge, Task
from lightning_collapse.utilities.points import Flag, Point
from tests.regression import Regressor, loader
from tests.toys import Claims, PointKeeper, fit

Script = Sequence[tuple[float, float, int]]


class Planted(Callback):
    """Publishes the dimension of features and of targets, and the rows behind both, one point per step."""

    def __init__(self, script: Script, flag: Flag = Flag.OK, distinct: float = 1.0) -> None:
        self.script, self.flag, self.distinct = script, flag, distinct

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        features, targets, n = self.script[batch_idx]
        values = {"intrinsic_dimension": features, "target_dimension": targets}
        points = [Point("regression_collapse", "head", m, batch_idx, v, n, flag=self.flag) for m, v in values.items()]
        points[1] = points[1]._replace(n=int(self.distinct * n))
        publish(trainer, pl_module, points)


def judged(script: Script, flag: Flag = Flag.OK, distinct: float = 1.0) -> tuple[CollapseGuard, PointKeeper]:
    guard, keeper = CollapseGuard(action="log"), PointKeeper()
    callbacks = [Claims("regression_collapse"), guard, Planted(script, flag, distinct), keeper]
    fit(Regressor(), callbacks, loader(), limit_train_batches=len(script), log_every_n_steps=1)
    return guard, keeper


def test_features_poorer_than_the_targets() -> None:
    guard, keeper = judged([(6.0, 3.0, 500)] * 8 + [(2.0, 3.0, 500)] * 3 + [(4.0, 3.0, 500)] * 2)
    [verdict] = guard.verdicts
    assert (verdict.kind, verdict.layer, verdict.since, verdict.step) == ("regression_over_compression", "head", 8, 9)
    assert verdict.evidence == (
        "over 500 rows the intrinsic dimension of the features is 2, below the 3 of the targets; the run began with 6"
    )
    values = [point.value for point in keeper.curve("guard/regression_over_compression")]
    assert values == [0.0] * 9 + [1.0] * 3 + [0.0]


@pytest.mark.parametrize(
    "script",
    [
        [(3.0, 3.0, 500)] * 12,  # neural collapse leaves as many dimensions as targets
        [(2.75, 3.0, 100_000)] * 12,  # too little to matter, however sure
        [(2.6, 3.0, 100)] * 12,  # too little for so few rows
        [(6.0, 3.0, 500), (2.0, 3.0, 500)] * 8,  # one bad point is not two
        [(nan, 3.0, 500)] * 12,
        [(0.0, 3.0, 0)] * 12,
    ],
    ids=["collapsed", "small", "noise", "flicker", "unknown", "nothing"],
)
def test_what_only_looks_poorer_gets_no_verdict(script: Script) -> None:
    guard, _ = judged(script)
    assert guard.verdicts == []


def test_a_fresh_network_of_few_dimensions_has_eight_points() -> None:
    assert judged([(2.0, 3.0, 500)] * 7 + [(3.0, 3.0, 500)] * 3)[0].verdicts == []
    [verdict] = judged([(2.0, 3.0, 500)] * 10)[0].verdicts
    assert verdict.step == 8


def test_points_without_rows_are_not_judged() -> None:
    guard, _ = judged([(1.0, 3.0, 500)] * 12, Flag.NOT_CALLED)
    assert guard.verdicts == []


@pytest.mark.parametrize("n", [50, 500, 50_000])
def test_the_line_is_three_standard_errors_or_a_tenth(n: int) -> None:
    line = exp(-max(3 * sqrt(2 / n), 0.1))
    assert judged([(3 * line * 0.999, 3.0, n)] * 10)[0].verdicts
    assert not judged([(3 * line * 1.001, 3.0, n)] * 10)[0].verdicts


def test_samples_that_repeat_in_the_window_say_nothing() -> None:
    script = [(6.0, 3.0, 500)] * 8 + [(2.0, 3.0, 500)] * 3
    assert judged(script, distinct=0.8)[0].verdicts == []
    assert judged(script, distinct=0.95)[0].verdicts


@pytest.mark.parametrize("loses", [False, True])
def test_as_long_as_the_loss_keeps_what_it_gained_it_is_a_notice(loses) -> None:
    """Targets with noise have more dimensions than what can be told of them."""
    judge = Judge(["regression_over_compression"])
    for step in range(24):
        loss = 1.0 if loses and step > 12 else 0.9**step
        values = {"intrinsic_dimension": 2.6, "target_dimension": 5.6}
        points = [Point("regression_collapse", "head", name, step, value, 300) for name, value in values.items()]
        judge.update([*points, Point("training", "", "loss", step, loss)], Task("regression"))
    assert [notice.kind for notice in judge.notices] == ["regression_over_compression"]
    assert len(judge.verdicts) == loses
