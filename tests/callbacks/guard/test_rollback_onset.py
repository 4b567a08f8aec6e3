"""A rollback goes to before the onset, whenever the failure was noticed, and passes over updates after it."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.lr_scheduler import StepLR

from lightning_collapse import CollapseGuard, Rollback, SkipStep, StabilityMonitor
from lightning_collapse.reporting import publish
from lightning_collapse.rules import CompleteCollapse
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY, QUIET, Claims, Toy, batches, fit

BAD = {**HEALTHY, "feature_std": 1e-4}


class Net(LightningModule):
    """With buffers of the forward pass, moments and a schedule."""

    def __init__(self, kind=torch.optim.AdamW, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.kind, self.options = kind, options

    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self):
        optimizer = self.kind(self.parameters(), lr=0.01, **self.options)
        return [optimizer], [{"scheduler": StepLR(optimizer, 3, 0.7), "interval": "step"}]


class Script(Callback):
    """Planted readings, one a step, and parameters and states of optimizers after each."""

    def __init__(self, script):
        self.script, self.states, self.buffers = script, {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step - 1
        values = self.script[step]
        publish(trainer, pl_module, [Point("collapse", "z", name, step, v, 64, 60.0) for name, v in values.items()])
        averages = [c._average_model.state_dict() for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
        found = dict(pl_module.named_parameters()), trainer.optimizers[0].state_dict()["state"], averages
        self.states[step] = copy.deepcopy(found)
        self.buffers[step] = copy.deepcopy(dict(pl_module.named_buffers()))


def run(script, rollback, tmp_path, *callbacks, model=None, **kwargs):
    torch.manual_seed(0)
    planted = Script(script)
    guard = CollapseGuard(action=["log", rollback], dirpath=str(tmp_path / "guard"))
    trainer = fit(model or Net(), [*callbacks, Claims(), guard, planted], batches(len(script)), **kwargs)
    return planted, trainer


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(equal, one, other))


@pytest.fixture
def late(monkeypatch):
    """The collapse is noticed seven points after it has begun: at step 13, since step 6."""
    monkeypatch.setattr(CompleteCollapse, "onset", lambda self, evidence, since: since - 6)
    return [HEALTHY] * 12 + [BAD] * 2 + [HEALTHY]


def steps_of(tmp_path):
    return sorted(int(file.stem.rpartition("=")[2]) for file in (tmp_path / "guard").iterdir())


def test_it_is_the_newest_that_lies_a_margin_before_the_onset(late, tmp_path):
    words = "step 3 again.* That is 3 steps before the onset of complete collapse in `z` at step 6"
    with pytest.warns(UserWarning, match=words):
        planted, _ = run(late, Rollback(1.0, 1, margin=3, keep=20), tmp_path)
    assert equal(planted.states[13][:2], planted.states[3][:2])
    assert steps_of(tmp_path) == [0, 1, 2, 3, 14]  # what came after the onset is gone


def test_what_lies_too_near_is_passed_over_where_saves_are_rare(late, tmp_path):
    with pytest.warns(UserWarning, match="are those of step 0 again.* 6 steps before"):
        planted, _ = run(late, Rollback(1.0, 4, margin=3), tmp_path)
    assert equal(planted.states[13][:2], planted.states[0][:2])


def test_if_none_lies_before_the_onset_it_is_the_oldest_and_that_is_said(late, tmp_path):
    words = "step 9 again.* None is kept of 3 steps before the onset of complete collapse in `z` at step 6 or earlier"
    with pytest.warns(UserWarning, match=words):
        planted, _ = run(late, Rollback(1.0, 1, margin=3, keep=3), tmp_path)
    assert equal(planted.states[13][:2], planted.states[9][:2])


@pytest.mark.filterwarnings("ignore:`Rollback` cannot read .*step=3.ckpt")
def test_if_a_file_is_lost_the_next_older_one_is_taken(late, tmp_path):
    class Cleaner(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 12:
                [file] = (tmp_path / "guard").glob("*step=3.ckpt")
                file.unlink()

    with pytest.warns(UserWarning, match="are those of step 2 again"):
        planted, _ = run(late, Rollback(1.0, 1, margin=3, keep=20), tmp_path, Cleaner())
    assert equal(planted.states[13][:2], planted.states[2][:2])


@pytest.mark.filterwarnings("ignore:`Rollback` at step")
def test_a_second_return_to_before_the_first_lowers_the_rate_twice(tmp_path):
    script = [HEALTHY] * 6 + [BAD] * 2 + [HEALTHY] * 2 + [BAD] * 2
    _, trainer = run(script, Rollback(0.5, 100, margin=4), tmp_path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.7**0 * 0.25)
    _, trainer = run(script, Rollback(0.5, 1, margin=4, keep=1), tmp_path / "other")  # to 5, then to one saved after it
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.7**2 * 0.25)


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "rprop": (torch.optim.Rprop, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_passed_over_after_a_return_and_the_forward_pass_goes_on(name, tmp_path):
    kind, options = OPTIMIZERS[name]
    script = [HEALTHY] * 4 + [BAD] * 2 + [HEALTHY] * 5
    rollback = Rollback(1.0, 1, margin=1, skip_steps=3)
    with pytest.warns(UserWarning, match="The next 3 updates are not made"):
        planted, trainer = run(script, rollback, tmp_path, EMAWeightAveraging(decay=0.9), model=Net(kind, **options))
    for step in (5, 6, 7, 8):
        assert equal(planted.states[step], planted.states[3])
    assert all(not equal(planted.buffers[step], planted.buffers[step - 1]) for step in (6, 7, 8))
    assert not equal(planted.states[9][0], planted.states[8][0])
    assert not equal(planted.states[9][2], planted.states[8][2])
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.filterwarnings("ignore:`Rollback` at step 5")
def test_averages_follow_two_who_skip(tmp_path):
    """Three updates are passed over after the return, and the one right after them is not finite."""

    class Broken(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 9 else 1.0)

    script, average = [HEALTHY] * 4 + [BAD] * 2 + [HEALTHY] * 6, EMAWeightAveraging(decay=0.9)
    torch.manual_seed(0)
    planted = Script(script)
    guard = CollapseGuard(action=["log", SkipStep(), Rollback(1.0, 1, margin=1, skip_steps=3)], dirpath=str(tmp_path))
    monitors = [average, StabilityMonitor(every_n_steps=2), Claims(), guard, planted]
    fit(Broken(), monitors, batches(len(script)))
    assert all(equal(planted.states[step], planted.states[3]) for step in (5, 6, 7, 8, 9))
    assert int(planted.states[9][2][0]["n_averaged"]) == 4
    assert int(planted.states[11][2][0]["n_averaged"]) == 6


@pytest.mark.filterwarnings("ignore:`Rollback` at step 5")
def test_an_interrupted_run_passes_over_the_rest(tmp_path):
    script = [HEALTHY] * 4 + [BAD] * 2 + [HEALTHY] * 5

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 6:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def go(checkpoint=None):
        torch.manual_seed(0)
        planted = Script(script)
        guard = CollapseGuard(action=Rollback(0.5, 1, margin=1, skip_steps=3), dirpath=str(tmp_path / "guard"))
        callbacks = [EMAWeightAveraging(decay=0.9), Claims(), guard, planted, *([] if checkpoint else [Save()])]
        trainer = Trainer(**{**QUIET, "max_epochs": 11, "logger": False, "callbacks": callbacks})
        trainer.fit(Net(), batches(1), ckpt_path=checkpoint)
        return planted

    whole, resumed = go(), go(tmp_path / "half.ckpt")
    assert sorted(resumed.states) == [7, 8, 9, 10]
    assert equal(resumed.states[8][:2], whole.states[3][:2])
    assert all(equal(resumed.states[step], whole.states[step]) for step in resumed.states)


def test_what_runs_its_closure_several_times_is_refused(tmp_path):
    class Line(Toy):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    guard = CollapseGuard(action=Rollback(skip_steps=2), dirpath=str(tmp_path))
    words = r"`Rollback\(skip_steps=2\)` cannot leave out an update of `LBFGS`"
    with pytest.raises(MisconfigurationException, match=words):
        fit(Line(), [Claims(), guard])
