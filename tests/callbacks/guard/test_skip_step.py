"""Skipped steps leave a run bit-equal to one in which these updates were not made by hand."""

from math import nan

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel

from lightning_collapse import CollapseGuard, FirstNonFinite, GradientMonitor, Rollback, SkipStep, StabilityMonitor
from tests.toys import QUIET, MemoryLogger, Toy, batches, fit

PLANTED = {0: nan, 75: 1e3, 76: nan, 90: 1e3}
"""What the loss is multiplied by, by step."""
STEPS = 100


def by_hand(kind, skipped):
    """An optimizer that runs its closure and makes no update at these steps."""

    class ByHand(kind):
        model = None

        def step(self, closure=None):
            loss = None if closure is None else closure()
            if self.model.trainer.global_step // len(self.model.trainer.optimizers) not in skipped:
                super().step()
            return loss

    return ByHand


class Net(LightningModule):
    """With buffers of the forward pass, random numbers in it, and a schedule."""

    def __init__(self, planted=PLANTED, kind=optim.AdamW, skipped=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 2))
        self.planted, self.kind, self.options = planted, kind, {"lr": 1e-3, **options}
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean() * self.planted.get(self.trainer.global_step, 1.0)

    def configure_optimizers(self):
        kind = self.kind if self.skipped is None else by_hand(self.kind, self.skipped)
        optimizer = kind(self.parameters(), **self.options)
        optimizer.model = self
        return [optimizer], [{"scheduler": StepLR(optimizer, 30, 0.7), "interval": "step"}]


class AveragesByHand(EMAWeightAveraging):
    def __init__(self, skipped):
        super().__init__(decay=0.9)
        self.skipped = skipped

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx not in self.skipped


def state_of(trainer):
    averages = [c._average_model.state_dict() for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
    states = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return copied((trainer.lightning_module.state_dict(), states, averages, torch.get_rng_state()))


def copied(value):
    """A deep copy, at a tenth of the cost of Python's."""
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [copied(each) for each in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


class Last(Callback):
    """The state after each step; at the end ``WeightAveraging`` puts its average in the place of the weights."""

    def __init__(self):
        self.states = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.states[trainer.global_step - 1] = state_of(trainer)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) and torch.equal(one.isnan(), other.isnan())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return all(map(equal, one, other)) if isinstance(one, list | tuple) else one == other


def run(model, *callbacks, steps=STEPS, **kwargs):
    torch.manual_seed(0)
    last = Last()
    trainer = fit(model, [*callbacks, last], batches(steps * kwargs.get("accumulate_grad_batches", 1)), **kwargs)
    return last.states, trainer


def watched():
    return CollapseGuard(action=["log", SkipStep()]), StabilityMonitor(every_n_steps=10)


OPTIMIZERS = {
    "adamw": (optim.AdamW, {}),
    "fused": (optim.AdamW, {"fused": True}),
    "fused momentum": (optim.SGD, {"momentum": 0.9, "fused": True}),
    "adagrad": (optim.Adagrad, {"fused": True}),
    "nadam": (optim.NAdam, {}),
}


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_if_the_updates_had_not_been_made(name, options):
    kind, arguments = OPTIMIZERS[name]
    ours, trainer = run(Net(kind=kind, **arguments), *watched(), EMAWeightAveraging(decay=0.9), **options)
    other, _ = run(Net(kind=kind, skipped=PLANTED, **arguments), AveragesByHand(PLANTED), **options)
    assert all(equal(ours[step], other[step]) for step in range(STEPS))
    assert dict(trainer.logger.curve("stability/all/skipped"))[STEPS - 1] == len(PLANTED)
    assert not equal(ours[80][0], ours[STEPS - 1][0])


@pytest.mark.parametrize("name", ["adamw", "fused", "fused momentum"])
def test_a_gradient_scaler(name):
    """It skips infinite gradients by itself, and knows nothing of bursts."""
    kind, arguments = OPTIMIZERS[name]
    planted = {70: float("inf"), 80: 1e3, 81: 1e3}

    def go(model, *callbacks):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=20)
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        states, _ = run(model, *callbacks, plugins=[precision])
        return states, scaler.state_dict()

    ours, scale = go(Net(planted, kind, **arguments), *watched())
    other, same = go(Net(planted, kind, skipped={80, 81}, **arguments))
    assert all(equal(ours[step], other[step]) for step in range(STEPS))
    assert scale == same
    assert all(value.isfinite().all() for value in ours[STEPS - 1][0].values())


class Pair(LightningModule):
    """Two optimizers, stepped by hand; one of the losses has planted factors."""

    def __init__(self, skipped=None, fused=False):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(16, 4), nn.Linear(4, 2)
        self.skipped, self.fused = skipped, fused

    def training_step(self, batch, batch_idx):
        for i, optimizer in enumerate(self.optimizers()):
            loss = self.second(self.first(batch)).pow(2).mean()
            loss = loss * PLANTED.get(batch_idx, 1.0) if i == 1 else loss
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        made = [optim.AdamW, optim.AdamW if self.skipped is None else by_hand(optim.AdamW, self.skipped)]
        parts = self.first, self.second
        found = [kind(part.parameters(), fused=self.fused) for kind, part in zip(made, parts, strict=True)]
        found[1].model = self
        return found


@pytest.mark.parametrize("fused", [False, True])
def test_of_two_optimizers_stepped_by_hand_the_one_is_skipped(fused):
    guard, monitor = watched()
    ours, trainer = run(Pair(fused=fused), monitor, guard, EMAWeightAveraging(decay=0.9))
    other, _ = run(Pair(PLANTED, fused), EMAWeightAveraging(decay=0.9))
    assert all(equal(ours[step], other[step]) for step in ours)
    assert dict(trainer.logger.curve("stability/optimizer_1/skipped"))[STEPS - 1] == len(PLANTED)
    assert dict(trainer.logger.curve("stability/optimizer_0/skipped"))[STEPS - 1] == 0


def test_without_a_burst_nothing_changes():
    ours, _ = run(Net({}), *watched())
    other, _ = run(Net({}))
    assert equal(ours, other)


def test_an_average_of_the_module_itself_and_one_of_every_few_steps():
    """It passes over an update when no step was made since its last one."""

    class Own(Net):
        def __init__(self, every, **kwargs):
            super().__init__({70: nan, 71: 1e3, 80: 1e3}, **kwargs)
            self.every = every

        def configure_optimizers(self):
            self.average = AveragedModel(self.net)
            return super().configure_optimizers()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx % self.every == self.every - 1:
                self.average.update_parameters(self.net)

    _, trainer = run(Own(1), *watched())
    assert trainer.lightning_module.average.n_averaged == STEPS - 3
    _, trainer = run(Own(2), *watched())
    assert trainer.lightning_module.average.n_averaged == STEPS / 2 - 1  # both of 70 and 71 were skipped
    assert "update_parameters" not in vars(trainer.lightning_module.average)


def test_those_who_look_at_gradients_still_find_them():
    class Looks(Net):
        norms = 0.0

        def on_before_optimizer_step(self, optimizer):
            self.norms = self.norms + sum(float(p.grad.norm()) for p in self.parameters())

        def on_before_zero_grad(self, optimizer):
            assert all(p.grad is not None for p in self.parameters()) or not self.trainer.global_step

    _, trainer = run(Looks({80: 1e3}), *watched(), GradientMonitor(["net.0"], every_n_steps=1))
    assert trainer.logger.curve("gradients/net.0/norm")[80][1] > 0


def test_interrupted_and_resumed(tmp_path):
    planted = {75: 1e3, 76: nan, 82: 1e3, 90: 1e3}

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.global_step == 80:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def go(checkpoint=None, *more):
        torch.manual_seed(0)
        last = Last()
        model = Net(planted)
        model.net[2] = nn.Identity()  # a resumed run has other random numbers
        callbacks = [*watched(), EMAWeightAveraging(decay=0.9), last, *more]
        trainer = Trainer(**{**QUIET, "max_epochs": 10, "logger": MemoryLogger(), "callbacks": callbacks})
        trainer.fit(model, batches(10), ckpt_path=checkpoint)
        return last.states, trainer.logger.curve("stability/all/skipped")

    whole, curve = go(None, Save())
    resumed, rest = go(tmp_path / "half.ckpt")
    assert sorted(resumed) == list(range(80, 100))
    assert all(equal(resumed[step][:3], whole[step][:3]) for step in resumed)
    assert rest == [(step, value) for step, value in curve if step >= 80]
    assert rest[-1] == (99, 4.0)


def verdicts_of(planted, steps, **options):
    guard = CollapseGuard(action=["log", SkipStep()])
    states, trainer = run(Net(planted), StabilityMonitor(every_n_steps=10, **options), guard, steps=steps)
    return {verdict.kind: verdict for verdict in guard.verdicts}, states, trainer


def test_eight_bursts_in_a_row_are_a_new_level_and_a_verdict():
    found, states, trainer = verdicts_of(dict.fromkeys(range(80, 120), 1e3), 120)
    made = [step for step in range(79, 120) if not equal(states[step][1][0]["state"], states[step - 1][1][0]["state"])]
    assert made == [79, *range(88, 120)]
    assert found["skipped_steps"].step == 89
    words = "8 steps were skipped, 8 of the last 1,000; the last bursts in a row were taken for a new level"
    assert words in str(found["skipped_steps"])
    assert [step for step, value in trainer.logger.curve("stability/all/accepted") if value] == []  # for rules only


def test_what_is_not_finite_is_never_let_through_and_is_a_verdict_too():
    found, states, _ = verdicts_of(dict.fromkeys(range(30, 100), nan), 100)
    assert equal(states[99][1][0]["state"], states[29][1][0]["state"])
    assert list(found) == ["non_finite_step"]  # of what fails together, the first
    assert found["non_finite_step"].step == 39
    assert found["non_finite_step"].also


def test_one_step_in_a_hundred_is_too_many():
    found, _, _ = verdicts_of(dict.fromkeys(range(70, 115, 5), 1e3), 120)
    assert found == {}  # nine
    found, _, _ = verdicts_of(dict.fromkeys(range(70, 120, 5), 1e3), 120)
    assert list(found) == ["skipped_steps"]
    assert found["skipped_steps"].step == 119
    assert "10 steps were skipped, 10 of the last 1,000" in str(found["skipped_steps"])


def test_after_a_return_the_count_begins_anew(tmp_path):
    guard = CollapseGuard(action=["log", SkipStep(), Rollback(0.5, 10, margin=10)], dirpath=str(tmp_path))
    planted = dict.fromkeys(range(70, 120, 5), 1e3)
    with pytest.warns(UserWarning, match="`Rollback` at step 119"):
        run(Net(planted), StabilityMonitor(every_n_steps=10), guard, steps=160)
    assert [verdict.kind for verdict in guard.verdicts] == ["skipped_steps"]


class Line(Toy):
    def configure_optimizers(self):
        return optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("callbacks", "model", "words"),
    [
        ([], Net, r"`SkipStep\(\)` skips the steps that `StabilityMonitor` flags.* Add `StabilityMonitor\(\)`"),
        ([StabilityMonitor()], Net, r"has none that makes points. Write `StabilityMonitor\(every_n_steps=50\)`"),
        ([StabilityMonitor(10)], Line, r"`SkipStep\(\)` cannot leave out an update of `LBFGS`"),
    ],
)
def test_what_cannot_be_done_is_said_at_the_start(callbacks, model, words):
    guard = CollapseGuard(action=SkipStep(), rules=["loss_spike"] if callbacks else None)
    others = callbacks or [GradientMonitor(), _Claims()]
    with pytest.raises(MisconfigurationException, match=words):
        fit(model(), [*others, guard], log_every_n_steps=0)


class _Claims(Callback):
    family, curves = "plasticity", ("dormant_fraction",)


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left(fails):
    class Boom(Net):
        def training_step(self, batch, batch_idx):
            if fails and batch_idx == 3:
                raise ValueError("boom")
            return super().training_step(batch, batch_idx)

    guard, monitor = CollapseGuard(action=["log", SkipStep()]), StabilityMonitor(every_n_steps=2)
    model, average = Boom({1: nan}, fused=True), EMAWeightAveraging(decay=0.9)
    trainer = Trainer(**{**QUIET, "logger": False, "callbacks": [guard, monitor, average]})
    try:
        trainer.fit(model, batches(5))
        assert not fails
    except ValueError:
        assert fails
    [optimizer] = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "found_inf" not in vars(optimizer)
    assert monitor.on_flag == []
    assert not monitor.skips


def test_what_a_skipped_step_left_in_a_buffer_is_said_once():
    class Spoilt(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch * (nan if batch_idx in (40, 60) else 1.0), batch_idx)

    with pytest.warns(UserWarning, match=r"before step 49, .* into the buffer `net.1.running_mean` and 1 more") as said:
        run(Spoilt(planted={}), *watched())
    assert sum("running_mean" in str(warning.message) for warning in said) == 1


def test_a_step_that_was_skipped_is_no_failure_of_the_module_that_made_it():
    guard = CollapseGuard(action=SkipStep())
    run(Net(planted={40: nan}), guard, StabilityMonitor(every_n_steps=10), FirstNonFinite(every_n_steps=10))
    assert not guard.verdicts
    guard = CollapseGuard(action="log")
    run(Net(planted={40: nan}), guard, StabilityMonitor(every_n_steps=10), FirstNonFinite(every_n_steps=10))
    assert {verdict.kind for verdict in guard.verdicts} >= {"non_finite_origin"}
