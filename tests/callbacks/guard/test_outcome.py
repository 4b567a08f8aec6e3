"""The outcome that a guard watches: read when it is logged, named by every verdict, and a verdict where it falls."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_collapse import CollapseGuard, CollapseMonitor
from lightning_collapse.callbacks import Action
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY, QUIET, Claims, MemoryLogger, PointKeeper, Toy, batches, fit, weights


class Scored(Toy):
    """Logs a score per validation, by a script; and others in training."""

    def __init__(self, script):
        super().__init__()
        self.script = script

    def training_step(self, batch, batch_idx):
        self.log("step_score", float(self.global_step))
        self.log("epoch_score", float(self.current_epoch), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.log("own_score", float(self.current_epoch))

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", self.script[self.current_epoch])


class Points(Callback):
    """A point of a layer per epoch, whose rows are equal from one on."""

    def __init__(self, sick_from=10**6):
        self.sick_from = sick_from

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        epoch = trainer.current_epoch
        values = {**HEALTHY, "relative_spread": 1e-4 if epoch >= self.sick_from else 0.6}
        if batch_idx == 0:
            step = trainer.global_step
            points = [Point("collapse", "z", name, step, value, 64, 60.0) for name, value in values.items()]
            publish(trainer, pl_module, points)


def noisy(level, step):
    return level + 0.01 * (step * 7 % 5 - 2)


FALLS = [noisy(0.9 if step < 30 else 0.3, step) for step in range(60)]


def watched(script, guard, *callbacks, **kwargs):
    keeper = PointKeeper()
    settings = {"max_epochs": len(script), "limit_val_batches": 1, "log_every_n_steps": 1, **kwargs}
    data = batches(2, size=8)
    model = Scored(script)
    callbacks = [Claims(), guard, *callbacks, keeper]
    trainer = Trainer(**{**QUIET, "logger": MemoryLogger(), "callbacks": callbacks, **settings})
    trainer.fit(model, data, data)
    return keeper, model


def test_a_score_that_falls_for_good_is_a_verdict():
    guard = CollapseGuard(action="log", outcome="val_acc", mode="max")
    keeper, _ = watched(FALLS, guard, Points())
    [verdict] = guard.verdicts
    assert (verdict.kind, verdict.layer) == ("outcome_drop", "val_acc")
    assert 2 * 28 <= verdict.since <= 2 * 31 < verdict.step <= 2 * 38
    assert str(verdict).startswith("The outcome you watch, `val_acc`, has got worse for good. Outcome drop since step")
    assert "where its best was 0.92" in verdict.evidence
    assert verdict.outcome == ""
    assert [point.value for point in keeper.curve("outcome/val_acc/value")] == pytest.approx(FALLS)
    assert [point.step for point in keeper.curve("outcome/val_acc/value")] == list(range(1, 121, 2))
    assert keeper.curve("guard/outcome_drop")[-1].value == 1


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_score_that_gets_better_or_stays_is_none(mode):
    script = [noisy(0.1 + 0.8 * (1 - 0.8**step), step) for step in range(60)]
    script = script if mode == "max" else [1 - score for score in script]
    guard = CollapseGuard(action="log", outcome="val_acc", mode=mode)
    watched(script, guard, Points())
    assert guard.verdicts == []


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (FALLS[:40], r"`val_acc` fell from 0.92 to 0.\d+ since step 5\d"),
        ([noisy(0.9, step) for step in range(40)], r"`val_acc` has not moved yet \(0.\d+, best 0.92\)"),
        ([0.9, 0.8], r"`val_acc` is 0.8, best 0.9, and 2 points are too few to tell a fall from noise"),
        ([0.8, 0.9], r"`val_acc` has not moved yet \(0.9, best 0.9\)"),
    ],
)
def test_every_verdict_says_whether_it_has_moved(script, words, caplog):
    guard = CollapseGuard(action="warn", outcome="val_acc", mode="max", patience=1)
    watched(script + script[-1:] * 2, guard, Points(sick_from=len(script)))
    verdict = next(verdict for verdict in guard.verdicts if verdict.kind == "complete_collapse")
    assert re.fullmatch(words, verdict.outcome)
    assert f"; {verdict.outcome}. Add `Regularizer" in caplog.text


def test_it_is_not_known_before_it_is_logged():
    guard = CollapseGuard(action="log", outcome="val_acc", mode="max", patience=1)
    watched([0.9, 0.9], guard, Points(sick_from=0))
    assert guard.verdicts[0].outcome == "`val_acc` is not known yet"


@pytest.mark.parametrize(
    ("name", "values"),
    [("epoch_score", [0.0, 1.0, 2.0]), ("own_score", [0.0, 1.0, 2.0]), ("step_score", [0.0, 2.0, 4.0])],
)
def test_scores_of_the_training_are_read_where_they_are_logged(name, values, tmp_path):
    guard = CollapseGuard(action="log", outcome=name, mode="max")
    # what a module logs in `on_train_epoch_end` is kept for those who ask before the epoch is over
    save = ModelCheckpoint(tmp_path, monitor="epoch_score")
    keeper, _ = watched([0.9] * 3, guard, Points(), save, enable_checkpointing=True)
    assert [point.value for point in keeper.curve(f"outcome/{name}/value")] == values


def test_a_loss_below_zero_is_watched_too():
    script = [1 - score - (0.3 if step > 3 else 0) for step, score in enumerate(FALLS)]
    guard = CollapseGuard(action="log", outcome="val_acc", mode="min")
    watched(script, guard, Points())
    assert [verdict.kind for verdict in guard.verdicts] == ["outcome_drop"]
    assert min(script) < 0
    assert "rose from" in guard._outcome.outcome.in_words()


def test_a_resumed_fit_goes_on(tmp_path):
    guard = CollapseGuard(action="log", outcome="val_acc", mode="max")
    watched(FALLS, guard, Points())
    first = CollapseGuard(action="log", outcome="val_acc", mode="max")
    save = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    watched(FALLS, first, Points(), save, enable_checkpointing=True)
    again = CollapseGuard(action="log", outcome="val_acc", mode="max")
    state = torch.load(tmp_path / "epoch=31.ckpt", weights_only=True)["callbacks"]["CollapseGuard"]
    again.load_state_dict(state)
    assert not again.verdicts
    assert again._outcome.state_dict() == state["outcome"]
    for epoch in range(32, 60):
        again.judge.update(again._outcome.outcome.update(2 * epoch + 1, FALLS[epoch]))
    [after], [before] = again.verdicts, guard.verdicts
    assert after.severity == pytest.approx(before.severity, rel=1e-5)  # a logger keeps single precision
    assert replace(after, severity=1.0) == replace(before, severity=1.0)


def test_a_resumed_fit_knows_since_when_it_has_fallen(tmp_path):
    guard = CollapseGuard(action="log", outcome="val_acc", mode="max")
    watched(FALLS, guard, Points())
    assert "fell from" in (words := guard._outcome.outcome.in_words())
    again = CollapseGuard(action="log", outcome="val_acc", mode="max")
    again.load_state_dict(guard.state_dict())
    assert again._outcome.outcome.in_words() == words
    # back half way: nearer to the best than to the worst, which it must remember for that
    for epoch in range(60, 150):
        points = again._outcome.outcome.update(2 * epoch + 1, noisy(0.55, epoch))
    assert (points[2].measure, points[2].value >= 1) == ("shift", True)
    for epoch in range(150, 200):
        points = again._outcome.outcome.update(2 * epoch + 1, noisy(0.89, epoch))
    assert "has not moved" in again._outcome.outcome.in_words()


class TurnsBack(Action):
    """From a collapse on all is what it was before the score fell."""

    def __init__(self, points):
        self.points = points

    def on_verdict(self, trainer, pl_module, judgement):
        if judgement.new[0].kind != "complete_collapse":
            return False
        self.points.sick_from = 10**6
        pl_module.script = [noisy(0.9, step) for step in range(len(pl_module.script))]
        return True


def test_what_was_turned_back_is_not_said_again():
    points = Points(sick_from=45)
    guard = CollapseGuard(action=TurnsBack(points), outcome="val_acc", mode="max")
    keeper, _ = watched(FALLS, guard, points)
    [drop, collapse] = guard.verdicts
    assert (drop.kind, collapse.kind) == ("outcome_drop", "complete_collapse")
    shifts = [point.value for point in keeper.curve("outcome/val_acc/shift") if point.step > collapse.step]
    assert len(shifts) > 10
    assert max(shifts) < 1


def test_a_fit_anew_knows_nothing_of_the_last():
    guard = CollapseGuard(action="log", outcome="val_acc", mode="max")
    watched(FALLS[:5], guard, Points())
    watched(FALLS[:3], guard, Points())
    assert guard._outcome.outcome.count == 3


def test_nothing_is_read_in_the_sanity_check_or_outside_of_a_fit():
    guard = CollapseGuard(action="log", outcome="val_acc", mode="max")
    keeper, _ = watched([0.9] * 2, guard, Points(), num_sanity_val_steps=2)
    assert len(keeper.curve("outcome/val_acc/value")) == 2


def test_one_that_never_shows_up_is_told_once_with_the_name_that_comes_nearest():
    guard = CollapseGuard(action="log", outcome="val_accc", mode="max")
    with pytest.warns(UserWarning, match=r"nothing is logged as 'val_accc'; there is .*Did you mean `val_acc`") as said:
        watched([0.9] * 3, guard, Points())
    assert sum("val_accc" in str(warning.message) for warning in said) == 1
    with pytest.warns(UserWarning, match=r"`CollapseGuard\(outcome='val_accc'\)`"):
        watched([0.9], guard, Points())


def test_watching_it_changes_no_weight():
    torch.manual_seed(0)
    _, model = watched([0.9] * 3, CollapseGuard(action="log", outcome="val_acc", mode="max"), CollapseMonitor())
    torch.manual_seed(0)
    bare = Scored([0.9] * 3)
    data = batches(2, size=8)
    fit(bare, [], data, max_epochs=3)
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(bare).items())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"outcome": "val_acc"}, "`mode` must be 'max' or 'min', what is best of `outcome`, got None"),
        ({"outcome": "val_acc", "mode": "best"}, "`mode` must be 'max' or 'min', .* got 'best'"),
        ({"mode": "max"}, "`mode` is 'max' and `outcome` is missing"),
        ({"outcome": "", "mode": "max"}, "`outcome` takes the name of a logged metric"),
        ({"rules": ["outcome_drop"]}, "`rules` has 'outcome_drop', which needs `outcome`"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        CollapseGuard(**arguments)


def test_it_may_be_the_only_rule():
    guard = CollapseGuard(action="log", outcome="val_acc", mode="max", rules=["outcome_drop"])
    watched([0.9], guard, Points(sick_from=0))
    assert guard.verdicts == []


def test_the_closing_line_says_it_too(caplog):
    with caplog.at_level(logging.INFO):
        watched([0.8, 0.9], CollapseGuard(action="log", outcome="val_acc", mode="max"), Points())
    assert "over 4 points; `val_acc` has not moved yet (0.9, best 0.9)." in caplog.text
