"""The average against a loop in float64, where it takes the place of the weights, and that training does not notice."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_collapse import ContinualMetrics, DynamicEMA, TaskBoundary
from tests.continual import Learner, held_out, ordered, steady, training
from tests.losses.test_no_wait import NoWait
from tests.toys import QUIET, ManualToy, MemoryLogger, batches, weights


class Recorder(Callback):
    """Weights and gradients before each step, and weights after each batch."""

    def __init__(self):
        self.steps, self.after = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {name: p for name, p in pl_module.named_parameters() if id(p) in owned and p.grad is not None}
        self.steps.append({name: (p.detach().double(), p.grad.double().clone()) for name, p in named.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(weights(pl_module))


class Stop(Callback):
    """Looks at the averages before they take the place of the weights."""

    def __init__(self, ema):
        self.ema, self.averages = ema, {}

    def on_train_epoch_end(self, trainer, pl_module):
        self.averages = self.ema.averages


def reference(steps, form):
    """The formula in a loop over steps and tensors."""
    average, past, factors = {}, {}, []
    for step in steps:
        for name, (weight, gradient) in step.items():
            if name not in past:
                average[name], beta = weight.clone(), 0.99
            else:
                old_weight, old_gradient = past[name]
                below = (weight - average[name]).abs().sum() * (gradient - old_gradient).abs().sum()
                rate = (gradient.abs().sum() + 1) / below
                rate = rate * (weight - old_weight).abs().sum() if form == "paper" else 1 - 2 * rate
                beta = rate.item() if 0 < rate < 1 else 0.99
            factors.append(beta)
            average[name] = beta * average[name] + (1 - beta) * weight
            past[name] = weight.clone(), gradient
    return average, factors


def fit(model, *callbacks, data=None, **kwargs):
    torch.manual_seed(0)
    trainer = Trainer(**{**QUIET, "logger": False, "callbacks": list(callbacks), **kwargs})
    trainer.fit(model, data or training(0))
    return trainer


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("form", ["paper", "released"])
def test_averages_are_those_of_the_formula_and_end_the_fit(form):
    ema, recorder, logger, model = DynamicEMA(form), Recorder(), MemoryLogger(), Learner()
    stop = Stop(ema)
    fit(model, ema, recorder, stop, max_epochs=2, logger=logger, log_every_n_steps=1)
    expected, factors = reference(recorder.steps, form)
    assert len(set(factors)) > 5
    for name, value in expected.items():
        torch.testing.assert_close(stop.averages[name].double(), value, rtol=1e-4, atol=1e-6)
        assert torch.equal(model.get_parameter(name).detach(), stop.averages[name])
    assert not ema.averages
    curve = [value for _, value in logger.curve("continual/ema_decay")]
    tensors = len(expected)
    means = [sum(factors[i : i + tensors]) / tensors for i in range(0, len(factors), tensors)]
    assert curve == pytest.approx(means, rel=1e-4)
    fallback = [value for _, value in logger.curve("continual/ema_fallback")]
    assert fallback[0] == 1
    assert all(0 <= value <= 1 for value in fallback)


def test_training_does_not_notice_and_validation_sees_averages():
    class Validated(Learner):
        def __init__(self):
            super().__init__()
            self.seen = []

        def validation_step(self, batch, batch_idx):
            self.seen.append({name: p.detach().clone() for name, p in self.named_parameters()})

    runs = []
    for ema in ([], [DynamicEMA()]):
        recorder, model = Recorder(), Validated()
        averages = [Stop(ema[0])] if ema else []
        torch.manual_seed(0)
        trainer = Trainer(
            **{**QUIET, "logger": False, "max_epochs": 2, "limit_val_batches": 1},
            callbacks=[*ema, recorder, *averages],
            check_val_every_n_epoch=2,
        )
        trainer.fit(model, training(0), held_out(0))
        runs.append((recorder.after, torch.rand(3)))
    (plain, drawn), (averaged, again) = runs
    assert all(map(same, plain, averaged))
    assert torch.equal(drawn, again)
    assert same(model.seen[-1], averages[0].averages)
    assert not same(model.seen[-1], averaged[-1])


def test_accumulation_manual_steps_frozen_ones_and_two_optimizers():
    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.parts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)])

        def training_step(self, batch, batch_idx):
            for i, optimizer in enumerate(self.optimizers()):
                if i == 0 or batch_idx % 2:
                    optimizer.zero_grad()
                    self.manual_backward(nn.functional.cross_entropy(self.parts[i](batch[0]), batch[1]))
                    optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.parts[:2]]

    cases = [(Two(), {}), (ManualToy(), {"data": batches()}), (Learner(), {"accumulate_grad_batches": 4})]
    for model, options in cases:
        ema, recorder = DynamicEMA(), Recorder()
        stop = Stop(ema)
        fit(model, ema, recorder, stop, **options)
        expected, _ = reference(recorder.steps, "paper")
        assert expected.keys() == stop.averages.keys()
        for name, value in expected.items():
            torch.testing.assert_close(stop.averages[name].double(), value, rtol=1e-4, atol=1e-6)
    assert len(recorder.steps) == 2


def test_a_gradient_scaler_does_not_scale_what_is_read():
    runs = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        ema = DynamicEMA()
        stop = Stop(ema)
        fit(Learner(), ema, stop, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
        runs.append(stop.averages)
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-2, atol=1e-3)


def test_weights_that_were_no_numbers_for_a_while_leave_no_average_and_say_so():
    class Spoil(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.weights = weights(pl_module)
            if trainer.global_step == 2:
                pl_module.head.weight.data.fill_(torch.nan)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                pl_module.load_state_dict(self.weights)

    recorder, model = Recorder(), Learner()
    with pytest.warns(UserWarning, match="putting averages in place failed with .*they are not finite"):
        fit(model, Spoil(), DynamicEMA(), recorder)
    assert same(weights(model), recorder.after[-1])
    assert model.head.weight.isfinite().all()


def test_what_measures_a_task_finds_the_averages_there():
    ema, recorder, model = DynamicEMA(), Recorder(), Learner()
    metrics = ContinualMetrics([held_out(0), held_out(1)])
    fit(model, ema, metrics, recorder, TaskBoundary(every_n_epochs=1), max_epochs=2)
    model.eval()
    x, y = held_out(1).dataset.tensors
    accuracy = (model(x).argmax(1) == y).float().mean()
    torch.testing.assert_close(metrics.values[1, 1], accuracy)
    started = recorder.steps[6]["head.weight"][0]  # of the second task
    assert not torch.equal(started.float(), recorder.after[5]["head.weight"])


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    class Saver(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole = steady()
    fit(whole, DynamicEMA(), Saver(), data=ordered(0), max_epochs=2)
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not any("average" in name for name in checkpoint["state_dict"])
    resumed = steady(seed=3)
    trainer = Trainer(**{**QUIET, "logger": False, "max_epochs": 2}, callbacks=[DynamicEMA()])
    trainer.fit(resumed, ordered(0), ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(whole), weights(resumed))


def test_no_step_waits_for_the_device():
    class Watched(DynamicEMA):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            with NoWait():
                super().on_before_optimizer_step(trainer, pl_module, optimizer)

    ema = Watched()
    fit(Learner(), ema)
    assert not ema.containment.failed


def test_an_error_in_validation_leaves_the_weights_of_training():
    class Failing(Learner):
        def validation_step(self, batch, batch_idx):
            raise ValueError("boom")

    recorder, model = Recorder(), Failing()
    trainer = Trainer(
        **{**QUIET, "logger": False, "limit_val_batches": 1, "num_sanity_val_steps": 0},
        callbacks=[DynamicEMA(), recorder],
    )
    with pytest.raises(ValueError, match="boom"):
        trainer.fit(model, training(0), held_out(0))
    assert same(weights(model), recorder.after[-1])


def test_another_form_is_refused():
    with pytest.raises(ValueError, match=r"`form` must be one of .*, got 'code'"):
        DynamicEMA("code")
