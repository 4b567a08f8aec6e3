"""Which modules are tuned, the steps against a loop, when, what stays untouched, what fails, and resuming."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import IterableDataset

from lightning_collapse import FPF, ContinualMetrics, ForgettingMonitor, WeightPenalty
from lightning_collapse.penalties import EWC
from tests.continual import Learner, held_out, ordered, steady, task, training
from tests.toys import QUIET, ManualToy, MemoryLogger, batches, weights

BUFFER = list(held_out(0))


def fit(model, *callbacks, data=None, seed=0, ckpt_path=None, **kwargs):
    torch.manual_seed(seed)
    trainer = Trainer(**{**QUIET, "logger": False, "callbacks": list(callbacks), **kwargs})
    trainer.fit(model, ordered(seed) if data is None else data, ckpt_path=ckpt_path)
    return trainer


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_most_sensitive_are_tuned_as_a_loop_would_and_all_else_stays():
    model, plain, monitor = steady(), steady(), ForgettingMonitor()
    fpf = FPF(BUFFER, fraction=0.5, iterations=7, lr=0.1)
    fit(plain, monitor)
    fit(model, fpf)
    assert fpf.tuned == monitor.select_top(0.5)
    assert fpf.tuned == ["body.1.buffers", "head"]  # of the four: `body.0` and `body.1` stay
    expected = {name: value.clone() for name, value in plain.state_dict().items()}
    plain.double().train()
    for i in range(7):
        x, y = BUFFER[i % len(BUFFER)]
        loss = nn.functional.cross_entropy(plain(x.double()), y)
        moved = torch.autograd.grad(loss, list(plain.head.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(plain.head.parameters(), moved, strict=True):
                weight -= 0.1 * gradient
    for name, value in model.state_dict().items():
        if name.startswith(("head.", "body.1.running")):
            torch.testing.assert_close(value, plain.state_dict()[name].float())  # by the rounding of the first
            assert not torch.equal(value, expected[name])
        elif name != "body.1.num_batches_tracked":
            assert torch.equal(value, expected[name]), name


def test_statistics_of_a_normalization_that_is_not_tuned_stay():
    model, plain = steady(), steady()
    fpf = FPF(BUFFER, fraction=0.01, iterations=3, lr=0.1)
    for learner in (model, plain):
        learner.body[1].momentum = 1e-4  # moves least
    fit(plain)
    fit(model, fpf)
    assert fpf.tuned == ["head"]
    assert same(weights(model.body), weights(plain.body))
    assert model.body[1].training == plain.body[1].training


def test_what_is_frozen_is_not_copied_before_it_is_trained():
    class Unfreezes(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.body[0].requires_grad_(True)

    model, fpf = steady(), FPF(BUFFER, fraction=1.0, iterations=1)
    model.body[0].requires_grad_(False)
    fit(model, fpf)
    assert not [name for name in fpf.state_dict()["snapshot"] if name.startswith("body.0")]
    assert sorted(fpf.tuned) == ["body.1", "body.1.buffers", "head"]
    fit(model, fpf, Unfreezes(), max_epochs=2)
    assert "body.0" in fpf.tuned
    assert {"body.0.weight", "body.0.bias"} < fpf.state_dict()["snapshot"].keys()


def test_what_a_resumed_fit_unfreezes_in_its_first_batch_is_compared_with_the_checkpoint(tmp_path):
    class Unfreezes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # behind that of FPF
            pl_module.body[0].requires_grad_(True)

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")
            self.snapshot = fpf.state_dict()["snapshot"]

    found = {}
    for start in (None, tmp_path / "0.ckpt"):
        model, fpf, callback = steady(), FPF(BUFFER, iterations=1), Unfreezes()
        model.body[0].requires_grad_(False)
        fit(model, fpf, callback, max_epochs=2, ckpt_path=start)
        found[start] = callback.snapshot
    whole, resumed = found.values()
    assert "body.0.weight" in whole
    assert same(whole, resumed)


class Busy(Learner):
    """Logs, keeps a list, and has a schedule."""

    def __init__(self):
        super().__init__()
        self.losses = []
        self.body[0].bias.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.losses.append(batch_idx)
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_training_does_not_notice(accumulate):
    """At a learning rate of next to nothing every bit of the parameters is that of a plain run."""
    runs = []
    for fpf in ([], [FPF(BUFFER, fraction=1.0, iterations=2, lr=1e-30, times=3)]):
        model, logger = Busy(), MemoryLogger()
        trainer = fit(
            model,
            *fpf,
            data=training(0),
            logger=logger,
            log_every_n_steps=1,
            max_epochs=2,
            accumulate_grad_batches=accumulate,
        )
        state = trainer.optimizers[0].state_dict()["state"]
        momentum = [state[i]["momentum_buffer"] for i in sorted(state)]
        facts = [
            trainer.global_step,
            model.losses,
            logger.rows,
            [p.requires_grad for p in model.parameters()],
            [part.training for part in model.modules()],
            trainer.optimizers[0].param_groups[0]["lr"],
        ]
        runs.append((dict(model.named_parameters()), momentum, facts, torch.rand(3)))
    (plain, momentum, facts, drawn), (tuned, again, others, numbers) = runs
    assert fpf[0].state_dict()["tunings"] == 3
    assert same(plain, tuned)
    assert all(map(torch.equal, momentum, again))
    assert facts == others
    assert torch.equal(drawn, numbers)


def test_several_times_at_equal_intervals():
    seen = []

    def buffer():
        seen.append(trainer.global_step)
        return BUFFER

    fpf = FPF(buffer, iterations=3, times=4)
    trainer = Trainer(**{**QUIET, "logger": False, "callbacks": [fpf], "max_epochs": 2})
    trainer.fit(Learner(), ordered(0))  # 12 steps
    assert seen == [3, 6, 9, 12]


def test_what_others_add_to_a_loss_is_not_added_and_penalties_learn_what_was_tuned(recwarn):
    model = steady()
    penalty, metrics = WeightPenalty(EWC(weight=10.0)), ContinualMetrics([held_out(0), held_out(1)])
    for seed in range(2):
        fit(model, FPF(BUFFER, iterations=2), penalty, metrics, seed=seed)
    assert not [warning for warning in recwarn if "have changed since" in str(warning.message)]


def test_a_gradient_scaler_changes_nothing():
    runs = []
    for scale in (1.0, 2.0**10):
        model = steady()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        fit(model, FPF(BUFFER, iterations=4, lr=0.1), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
        runs.append(weights(model))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-2, atol=1e-3)


class Breaking:
    """Batches, the third of which is none."""

    def __iter__(self):
        yield from BUFFER[:2]
        raise OSError("disk")


class Skipping(Learner):
    """Loses interest after the training."""

    def training_step(self, batch, batch_idx):
        return None if len(batch[0]) != 8 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (Breaking(), steady, "disk"),
        (list, steady, "fill the buffer before the task ends"),
        ([torch.zeros(2, 5)], steady, "failed with RuntimeError"),
        (BUFFER[:2], Skipping, None),
    ],
)
def test_what_fails_is_a_warning_and_leaves_the_weights(data, model, message, recwarn):
    plain, tuned = model(), model()
    fit(plain)
    fpf = FPF(data, iterations=5, fraction=0.5, lr=0.1)
    fit(tuned, fpf)
    said = [str(warning.message) for warning in recwarn if "`FPF`: the end of task 0 failed" in str(warning.message)]
    if message is None:
        assert not said
        assert same(dict(plain.named_parameters()), dict(tuned.named_parameters()))
    else:
        assert len(said) == 1
        assert message in said[0]
        assert same(weights(plain), weights(tuned))


@pytest.mark.parametrize("times", [1, 4])
def test_a_resumed_fit_is_the_uninterrupted_one(times, tmp_path):
    class Saver(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fpf():
        return FPF(lambda: training(0), iterations=5, lr=0.1, fraction=0.5, times=times)  # shuffled

    whole, first = steady(), fpf()
    fit(whole, first)
    fit(whole, first, Saver(), seed=1, max_epochs=2)
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed, second = steady(seed=5), fpf()
    torch.manual_seed(77)
    fit(resumed, second, seed=1, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(whole), weights(resumed))
    assert first.state_dict()["tunings"] == second.state_dict()["tunings"] == 2 * times


class Stream(IterableDataset):
    def __iter__(self):
        return iter(task(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": iter(BUFFER)}, "`data` takes batches that can be read again and again"),
        ({"data": []}, r"or a function .*, got \[\]"),
        ({"data": BUFFER, "fraction": 0.0}, "`fraction` must be above 0"),
        ({"data": BUFFER, "iterations": 0}, "`iterations` must be an integer of at least 1"),
        ({"data": BUFFER, "lr": 0.0}, "`lr` must be positive"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FPF(**arguments)


def test_fits_that_cannot_be_tuned_are_refused():
    with pytest.raises(MisconfigurationException, match="ManualToy steps its optimizers itself"):
        fit(ManualToy(), FPF(BUFFER), data=batches())
    stream = torch.utils.data.DataLoader(Stream(), batch_size=8)
    with pytest.raises(MisconfigurationException, match=r"times=2.* no length that is known"):
        fit(Learner(), FPF(BUFFER, times=2), data=stream)
    with pytest.raises(MisconfigurationException, match=r"times=9.* has 6 steps"):
        fit(Learner(), FPF(BUFFER, times=9))
