"""What fails together is one verdict that names the first place, and what comes later is another."""

import pytest
from lightning.pytorch import Callback

from lightning_collapse import CollapseGuard, CollapseMonitor
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Flag, Point
from tests import toys
from tests.toys import Claims, Toy, batches, fit

WELL = {**toys.HEALTHY, "nonfinite_fraction": 0.0}
LOW = {**WELL, "effective_rank": 1.02, "eigenvalue_effective_rank": 1.0}
STILL = {**WELL, "feature_std": 0.002}
BOTH = {**LOW, "feature_std": 0.002}
LOST = {**dict.fromkeys(WELL, float("nan")), "nonfinite_fraction": 1.0}


class Planted(Callback):
    """Readings of layers ``a``, ``b`` and ``c``, one point per step."""

    def __init__(self, script):
        self.script = script

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        points = []
        for layer, values in zip("abc", self.script[batch_idx], strict=True):
            flag = Flag.FEW_ROWS if values is LOST else Flag.OK
            points += [Point("collapse", layer, m, batch_idx, v, 64, 60.0, flag) for m, v in values.items()]
        publish(trainer, pl_module, points)


def judged(script, guard=None):
    guard = guard or CollapseGuard(action="log")
    monitor = Claims()
    trainer = fit(Toy(), [monitor, guard, Planted(script)], batches(len(script)), log_every_n_steps=1)
    said = [(verdict.kind, verdict.layer, verdict.since, list(verdict.also)) for verdict in guard.verdicts]
    return said, guard, trainer


def alike(*readings):
    return [tuple(readings)] * 4


HEALTHY = alike(WELL, WELL, WELL)


def test_layers_that_fail_together_are_one_verdict_of_the_first():
    said, guard, trainer = judged(HEALTHY + alike(WELL, LOW, LOW))
    assert said == [("dimensional_collapse", "b", 4, ["in `c`"])]
    assert "; also in `c`. Add `Regularizer(VICReg()" in str(guard.verdicts[0])
    assert trainer.callback_metrics["guard/dimensional_collapse"] == 2  # curves count every one


def test_layers_that_follow_are_attached():
    script = HEALTHY + [(LOW, WELL, WELL)] * 2 + [(LOW, LOW, WELL)] * 2 + [(LOW, LOW, LOW)] * 3
    assert judged(script)[0] == [("dimensional_collapse", "a", 4, ["in `b`", "in `c`"])]


def test_what_fails_much_later_is_another_verdict():
    script = HEALTHY + [(LOW, WELL, WELL)] * 8 + [(LOW, WELL, LOW)] * 3
    assert judged(script)[0] == [("dimensional_collapse", "a", 4, []), ("dimensional_collapse", "c", 12, [])]


def test_what_fails_again_soon_after_is_another_verdict():
    script = HEALTHY + [(LOW, WELL, WELL)] * 2 + [(WELL, WELL, WELL)] * 2 + [(LOW, WELL, WELL)] * 2
    said, _, _ = judged(script, CollapseGuard(action="log", patience=1))
    assert [since for *_, since, _ in said] == [4, 8]


def test_a_layer_without_any_spread_is_not_said_to_have_few_directions_too():
    said, guard, _ = judged(HEALTHY + alike(WELL, BOTH, LOW))
    assert said == [("complete_collapse", "b", 4, ["dimensional collapse in `c`"])]
    assert guard.verdicts[0].severity == pytest.approx(5.0)


def test_of_several_kinds_the_one_that_began_first_is_named():
    said, _, _ = judged([*HEALTHY, (WELL, WELL, LOW), *alike(STILL, WELL, LOW)])
    assert said == [("dimensional_collapse", "c", 4, ["complete collapse in `a`"])]


def test_features_that_are_no_numbers():
    said, guard, _ = judged(HEALTHY + alike(WELL, LOST, LOST))
    assert said == [("non_finite", "b", 4, ["in `c`"])]
    [verdict] = guard.verdicts
    assert verdict.severity == float("inf")
    assert "100 % of the rows hold NaN or infinity" in verdict.evidence
    assert verdict.advice.startswith("Return with `Rollback()`")


def test_one_point_with_an_overflow_is_no_verdict():
    assert judged([*HEALTHY, (WELL, {**WELL, "nonfinite_fraction": 0.1}, WELL), *HEALTHY])[0] == []


def test_a_resumed_guard_attaches_to_what_was_said_before():
    _, before, _ = judged(HEALTHY + [(LOW, WELL, WELL)] * 2)
    after = CollapseGuard(action="log")
    after.load_state_dict(before.state_dict())
    said, _, _ = judged([(LOW, LOW, WELL)] * 3, after)
    assert said == [("dimensional_collapse", "a", 4, ["in `b`"])]


def test_the_state_of_version_0_1_0_is_dropped_with_one_warning():
    guard = CollapseGuard(action="log")
    with pytest.warns(UserWarning, match="the checkpoint is of version 0.1.0; what it knew of the run is dropped"):
        guard.load_state_dict({"verdicts": [], "news": [], "first": {}, "rows": {}, "standing": {}, "healthy": {}})
    assert judged(HEALTHY + alike(LOW, WELL, WELL), guard)[0] == [("dimensional_collapse", "a", 4, [])]


def test_a_run_that_turns_nan_is_reported_where_it_began():
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                pl_module.encoder[2].weight.data[0, 0] = float("nan")

    guard = CollapseGuard(action="log")
    monitor = CollapseMonitor(["encoder.0", "encoder.2", "head"], every_n_steps=1)
    fit(Toy(), [Poison(), monitor, guard], batches(6))
    [verdict] = guard.verdicts
    assert (verdict.kind, verdict.layer, verdict.since, verdict.also) == ("non_finite", "encoder.2", 4, ("in `head`",))
