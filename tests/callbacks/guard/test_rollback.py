"""What the guard's rollback brings back, and what it leaves."""

import copy
import re

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, SequentialLR, StepLR

from lightning_collapse import CollapseGuard, Rollback
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY, Claims, batches, fit

BAD = {**HEALTHY, "feature_std": 1e-4}
SCHEDULERS = {
    "step": lambda o: StepLR(o, step_size=3, gamma=0.7),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=50),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=60),
    "warm-up": lambda o: SequentialLR(o, [LambdaLR(o, lambda s: (s + 1) / 4), StepLR(o, 5)], milestones=[4]),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:The epoch parameter in `scheduler.step",  # of SequentialLR itself
)


class Lit(LightningModule):
    """With buffers, momentum and a scheduler per step."""

    def __init__(self, schedule):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32))
        self.head = nn.Linear(32, 2)
        self.schedule = schedule

    def training_step(self, batch, batch_idx):
        return self.head(self.encoder(batch)).pow(2).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": SCHEDULERS[self.schedule](optimizer), "interval": "step"}]


class Worse(Lit):
    """Whose loss rises."""

    def training_step(self, batch, batch_idx):
        return 1.5**batch_idx + 0 * super().training_step(batch, batch_idx)


def state(trainer):
    return copy.deepcopy(
        {
            "weights": trainer.lightning_module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        }
    )


class Script(Callback):
    """Planted readings, and the state of training after each of them."""

    def __init__(self, script):
        self.script, self.states, self.rates = script, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        before = state(trainer)
        points = [Point("collapse", "z", name, batch_idx, v, 64, 60.0) for name, v in self.script[batch_idx].items()]
        publish(trainer, pl_module, points)
        self.states.append((before, state(trainer)))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def run(script, rollback, schedule="step", **kwargs):
    torch.manual_seed(0)
    guard = CollapseGuard(action=["log", rollback], dirpath=kwargs.pop("dirpath", None))
    planted = Script(script)
    monitor = Claims()
    trainer = fit(Lit(schedule), [monitor, guard, planted], batches(len(script)), **kwargs)
    return planted, guard, trainer


def assert_equal(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_everything_is_as_it_was_at_the_last_healthy_point(schedule, tmp_path):
    with pytest.warns(UserWarning, match="`Rollback` at step 6: .* those of step 4 again"):
        planted, _, _ = run(
            [HEALTHY] * 5 + [BAD] * 2 + [HEALTHY], Rollback(1.0, 1, margin=1), schedule, dirpath=str(tmp_path)
        )
    healthy, (_, returned) = planted.states[4][0], planted.states[6]
    assert_equal(returned, healthy)
    assert not torch.equal(planted.states[6][0]["weights"]["head.weight"], healthy["weights"]["head.weight"])


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_learning_rates_are_lower_from_then_on(schedule, tmp_path):
    script = [HEALTHY] * 5 + [BAD] * 2 + [HEALTHY] * 4
    with pytest.warns(UserWarning, match="0.25 times what they were then"):
        lowered, _, _ = run(script, Rollback(0.25, 1, margin=1), schedule, dirpath=str(tmp_path))
    healthy, _, _ = run([HEALTHY] * 11, Rollback(0.25, 1, margin=1), schedule, dirpath=str(tmp_path))
    # two steps later than the schedule of a run that was never turned back, and a quarter of it
    assert lowered.rates[6:] == pytest.approx([0.25 * rate for rate in healthy.rates[4:9]])


@pytest.mark.filterwarnings("ignore:`Rollback` at step .. weights")
def test_each_return_to_one_checkpoint_lowers_further_and_the_last_stops(tmp_path):
    script = [HEALTHY] * 2 + [BAD] * 20
    with pytest.warns(UserWarning, match="`Rollback` has returned 2 times, and stops the fit at step 7"):
        planted, guard, trainer = run(script, Rollback(0.5, 100, times=2), "lambda", dirpath=str(tmp_path))
    assert trainer.global_step == 8
    assert [verdict.step for verdict in guard.verdicts] == [3, 5, 7]
    assert_equal(planted.states[7][1]["weights"], planted.states[3][1]["weights"])  # what it ends with is healthy
    first = planted.rates[0]
    assert [planted.rates[3], planted.rates[5]] == pytest.approx([first / 2, first / 4])


def test_without_a_healthy_point_there_is_nothing_to_return_to(tmp_path):
    script = [{**HEALTHY, "relative_spread": 1e-4}] * 4
    with pytest.warns(UserWarning, match="`Rollback` has no healthy state to return to at step 1"):
        _, _, trainer = run(script, Rollback(), dirpath=str(tmp_path))
    assert trainer.global_step == 4


def test_checkpoints_are_rare(tmp_path):
    run([HEALTHY] * 15, Rollback(every_n_steps=4, keep=3), dirpath=str(tmp_path))
    names = [re.fullmatch(r"healthy-([0-9a-f]{8})-step=(\d+).ckpt", file.name).groups() for file in tmp_path.iterdir()]
    assert sorted(int(step) for _, step in names) == [4, 8, 12]
    assert len({run for run, _ in names}) == 1


def test_full_disk_does_not_end_the_run(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="`Rollback` could not save a checkpoint as"):
        _, _, trainer = run([HEALTHY] * 3, Rollback(), dirpath=str(tmp_path / "file" / "below"))
    assert trainer.global_step == 3


@pytest.mark.filterwarnings("ignore:`Rollback` at step .. weights")
def test_state_travels_with_the_guard(tmp_path):
    with pytest.warns(UserWarning, match="`Rollback` at step 4"):
        _, guard, _ = run([HEALTHY] * 3 + [BAD] * 2, Rollback(0.5, 1, times=1), dirpath=str(tmp_path))
    again = CollapseGuard(action=Rollback(times=1), dirpath=str(tmp_path))
    again.load_state_dict(guard.state_dict())
    with pytest.warns(UserWarning, match="has returned 1 times, and stops the fit at step 2"):
        fit(
            Lit("step"),
            [Claims(), again, Script([HEALTHY, BAD, BAD, BAD])],
            batches(4),
        )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"factor": 0}, r"`factor` multiplies the learning rate and must lie in \(0, 1\], got 0"),
        ({"factor": 1.5}, "got 1.5"),
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1, got 0"),
        ({"times": 0}, "`times` must be at least 1, got 0"),
        ({"margin": 0}, "`margin` must be at least 1, got 0"),
        ({"keep": 0}, "`keep` must be at least 1, got 0"),
        ({"skip_steps": -1}, "`skip_steps` must be at least 0, got -1"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        Rollback(**arguments)


NAN = dict.fromkeys(HEALTHY, float("nan"))


def kept_step(folder):
    """Of the newest file."""
    return max(torch.load(file, weights_only=False)["global_step"] - 1 for file in folder.glob("healthy-*.ckpt"))


def test_what_cannot_be_read_is_not_healthy(tmp_path):
    run([HEALTHY] * 3 + [NAN] * 3, Rollback(every_n_steps=1), dirpath=str(tmp_path))
    assert kept_step(tmp_path) == 2


def test_weights_with_nan_are_not_healthy_whatever_the_points_say(tmp_path):
    class Poison(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if trainer.global_step >= 3:
                pl_module.head.weight.data[0, 0] = float("nan")

    guard = CollapseGuard(action=Rollback(every_n_steps=1), dirpath=str(tmp_path))
    monitor = Claims()
    fit(Lit("step"), [monitor, Poison(), guard, Script([HEALTHY] * 6)], batches(6))
    assert kept_step(tmp_path) < 3


def test_a_state_that_already_looks_ill_to_another_rule_is_not_healthy(tmp_path):
    class Other(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            dormant = 0.9 if batch_idx >= 3 else 0.0
            publish(trainer, pl_module, [Point("plasticity", "a", "dormant_fraction", batch_idx, dormant, 64)])

    guard = CollapseGuard(action=Rollback(every_n_steps=1), dirpath=str(tmp_path), patience=10)
    monitor = Claims()
    fit(Worse("step"), [monitor, guard, Other(), Script([HEALTHY] * 6)], batches(6))
    assert kept_step(tmp_path) == 2


def test_a_resumed_guard_knows_what_looked_ill(tmp_path):
    class Other(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            dormant = 0.9 if batch_idx >= 3 else 0.0
            publish(trainer, pl_module, [Point("plasticity", "a", "dormant_fraction", batch_idx, dormant, 64)])

    def guard():
        return CollapseGuard(action=Rollback(every_n_steps=1), dirpath=str(tmp_path), patience=10)

    monitor = Claims()
    before, after = guard(), guard()
    fit(Lit("step"), [monitor, before, Other()], batches(4))
    for file in tmp_path.iterdir():  # of the first points, which were healthy
        file.unlink()
    after.load_state_dict(before.state_dict())
    fit(Lit("step"), [monitor, after, Script([HEALTHY] * 3)], batches(3))
    assert list(tmp_path.iterdir()) == []


class Odd:
    """What a user keeps among hyperparameters."""


class WithHyperparameters(Lit):
    def __init__(self, schedule, config):
        super().__init__(schedule)
        self.save_hyperparameters()


def fit_planted(model, tmp_path, *callbacks):
    planted = Script([HEALTHY] * 3 + [BAD] * 2 + [HEALTHY])
    guard = CollapseGuard(action=Rollback(0.5, 1, margin=1), dirpath=str(tmp_path))
    return fit(model, [Claims(), *callbacks, guard, planted], batches(6))


def test_hyperparameters_of_any_class(tmp_path):
    with pytest.warns(UserWarning, match="`Rollback` at step 4: .* those of step 2 again"):
        fit_planted(WithHyperparameters("step", Odd()), tmp_path)


def test_a_lost_checkpoint_does_not_end_the_run(tmp_path):
    class Cleaner(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                for file in tmp_path.glob("healthy-*.ckpt"):
                    file.unlink()

    with pytest.warns(UserWarning, match="`Rollback` cannot read .*healthy-.*ckpt") as said:
        trainer = fit_planted(Lit("step"), tmp_path, Cleaner())
    assert sum("cannot read" in str(warning.message) for warning in said) == 3  # of each that was kept
    assert trainer.global_step == 6


@pytest.mark.filterwarnings("ignore:`Rollback` has no healthy state")
def test_what_cannot_be_pickled_does_not_end_the_run(tmp_path):
    class Unsaved(Lit):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = lambda: None

    with pytest.warns(UserWarning, match="`Rollback` could not save a checkpoint as"):
        trainer = fit_planted(Unsaved("step"), tmp_path)
    assert trainer.global_step == 6


@pytest.mark.parametrize(("action", "match"), [(Rollback, r"Write `Rollback\(\)`"), (None, "got None"), (3, "got 3")])
def test_actions_that_are_none(action, match):
    with pytest.raises(ValueError, match=match):
        CollapseGuard(action=action)
