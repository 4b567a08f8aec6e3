"""Stability of steps: losses and norms against what was planted, bursts, shifts, non-finite steps, and who began."""

import math
from collections import deque

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, FirstNonFinite, StabilityMonitor
from tests.toys import QUIET, PointKeeper, Toy


class Planted(LightningModule):
    """A loss and a gradient norm of each part, as the batch says, whatever the weights are."""

    def __init__(self, manual=False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
        self.automatic_optimization = not manual

    def loss(self, value, *norms):
        slope = sum((part.weight * norm / 2).sum() for part, norm in zip((self.first, self.second), norms, strict=True))
        return value + (slope - slope.detach()).nan_to_num(0.0)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class TwoOptimizers(Planted):
    """Each part has an optimizer, the second steps twice."""

    def __init__(self):
        super().__init__(manual=True)

    def training_step(self, batch, batch_idx):
        value, first, second = batch
        one, two = self.optimizers()
        self.manual_backward(self.loss(value, first, 0 * second))
        one.step()
        one.zero_grad()
        for factor in (1, 3):
            two.zero_grad()
            self.manual_backward(self.loss(factor * value, 0 * first, factor * second))
            two.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.0) for part in (self.first, self.second)]


def noise(count, seed):
    return np.exp(0.05 * np.random.default_rng(seed).standard_normal(count))


def steps(count, **changes):
    """Loss 2, norms 3 and 4, with noise; then changes by step."""
    rows = np.stack([2 * noise(count, 0), 3 * noise(count, 1), 4 * noise(count, 2)], axis=1)
    for name, at in changes.items():
        for where, factor in at:
            rows[where, ["loss", "first", "second"].index(name)] *= factor
    return rows


def fit(rows, model=None, actions="warn", every=10, **kwargs):
    keeper, guard = PointKeeper(), CollapseGuard(action=actions)
    monitor = StabilityMonitor(every_n_steps=every)
    torch.manual_seed(0)
    trainer = Trainer(**{**QUIET, "logger": False, **kwargs}, callbacks=[monitor, keeper, guard])
    batches = [tuple(row) for row in torch.tensor(rows, dtype=torch.float32)]
    trainer.fit(Planted() if model is None else model, DataLoader(batches, batch_size=None))
    return keeper, guard


def values(keeper, name, layer="all"):
    return {point.step: point.value for point in keeper.curve(f"stability/{layer}/{name}")}


def test_points_are_means_of_every_step():
    rows = steps(40)
    keeper, guard = fit(rows)
    assert list(values(keeper, "loss")) == [0, 9, 19, 29, 39]
    norms = np.hypot(rows[:, 1], rows[:, 2])
    for name, steps_ in (("loss", rows[:, 0]), ("grad_norm", norms)):
        expected = [steps_[0], *(part.mean() for part in (steps_[1:10], steps_[10:20], steps_[20:30], steps_[30:]))]
        assert list(values(keeper, name).values()) == pytest.approx(expected, rel=1e-6)
    assert not guard.verdicts


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}]
)
def test_accumulated_steps_are_read_whole_and_before_clipping(settings):
    rows = steps(42)
    keeper, _ = fit(rows, every=5, accumulate_grad_batches=4, **settings)
    # of the last two batches of the epoch Lightning makes a step, with gradients divided by four
    groups = [rows[i : i + 4] for i in range(0, 42, 4)]
    norms = [np.hypot(*(group[:, 1:].sum(axis=0) / 4)) for group in groups]
    assert list(values(keeper, "loss").values())[1] == pytest.approx(rows[4:20, 0].mean(), rel=1e-6)
    assert list(values(keeper, "grad_norm").values())[1] == pytest.approx(np.mean(norms[1:5]), rel=1e-6)


def test_several_optimizers_are_told_apart():
    rows = steps(20)
    keeper, _ = fit(rows, TwoOptimizers())
    expected = {"optimizer_0": (rows[:, 0], rows[:, 1]), "optimizer_1": (2 * rows[:, 0], 2 * rows[:, 2])}
    for layer, of in expected.items():
        for name, curve in zip(("loss", "grad_norm"), of, strict=True):
            assert values(keeper, name, layer)[19] == pytest.approx(curve[10:].mean(), rel=1e-6)


def test_of_several_optimizers_the_module_is_named():
    keeper, guard = fit(steps(110, second=[(slice(105, None), np.nan)]), TwoOptimizers())
    [verdict] = guard.verdicts
    assert (verdict.kind, verdict.layer) == ("non_finite_step", "second")
    assert str(verdict).startswith("The loss or its gradient is NaN or infinite, first in `second`.")
    surges = {point.layer for point in keeper.points if point.measure == "surge"}
    assert surges == {"optimizer_0", "optimizer_1", "optimizer_1.second"}


def test_a_failure_of_an_optimizer_in_whose_modules_no_gradient_rose_names_none():
    _, guard = fit(steps(300, loss=[(slice(200, None), 3.0)]), TwoOptimizers())
    assert {verdict.layer for verdict in guard.verdicts} <= {"optimizer_0", "optimizer_1"}
    assert guard.verdicts[0].says == "The loss jumped and does not come back."


def test_norms_are_free_of_the_scale_and_its_search_is_no_failure():
    rows = steps(30)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too much for 16 bits at first
    keeper, guard = fit(rows, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert values(keeper, "loss")[29] == pytest.approx(rows[20:, 0].mean(), rel=1e-3)
    assert values(keeper, "grad_norm")[29] == pytest.approx(np.hypot(rows[20:, 1], rows[20:, 2]).mean(), rel=1e-3)
    assert values(keeper, "nonfinite_steps")[29] == 0
    assert not guard.verdicts


def test_a_burst_is_counted_and_its_module_named():
    keeper, guard = fit(steps(200, second=[(155, 50)]))
    assert values(keeper, "grad_norm_z")[159] > 20
    assert values(keeper, "spike_rate")[199] == pytest.approx(1 / 200)
    surges = {point.layer: point.value for point in keeper.points if point.measure == "surge" and point.step == 159}
    assert surges["second"] == pytest.approx(50, rel=0.2)
    assert "first" not in surges
    assert not guard.verdicts  # one step is no failure


@pytest.mark.parametrize(("length", "says"), [(20, []), (100, ["loss_spike"])])
def test_a_loss_that_stays_high_is_a_failure_and_one_that_comes_back_is_none(length, says):
    high = [(slice(200, 200 + length), 2.0)]
    _, guard = fit(steps(400, loss=high, first=[(slice(195, 200 + length), 40)]))
    assert [verdict.kind for verdict in guard.verdicts] == says
    for verdict in guard.verdicts:
        assert 190 <= verdict.since <= 202
        assert verdict.step <= 249
        assert verdict.layer == "first"


def test_a_loss_above_its_beginning_is_told_sooner():
    _, guard = fit(steps(300, loss=[(slice(20, 200), 0.3), (slice(200, 232), 3.0), (slice(232, 300), 0.3)]))
    assert [verdict.kind for verdict in guard.verdicts] == ["loss_spike"]
    assert 195 <= guard.verdicts[0].since <= 201
    assert guard.verdicts[0].step <= 229


def test_a_loss_that_falls_slowly_from_a_jump_but_stays_high_is_told():
    decays = [(at, 1e4 * 0.97 ** (at - 200)) for at in range(200, 300)]
    _, guard = fit(steps(300, loss=decays))
    assert [verdict.kind for verdict in guard.verdicts] == ["loss_spike"]
    assert guard.verdicts[0].step <= 229


def test_gradients_that_grow_while_the_loss_stands_still_are_a_notice():
    growing = [(at, min(1.05 ** (at - 250), 10)) for at in range(250, 400)]
    _, guard = fit(steps(400, first=growing, second=growing))
    assert not guard.verdicts
    assert [notice.kind for notice in guard.notices] == ["divergence_ahead"]
    falling = [(at, 0.97 ** (at - 250)) for at in range(250, 400)]
    _, guard = fit(steps(400, first=growing, second=growing, loss=falling))
    assert not guard.notices


@pytest.mark.parametrize("what", ["loss", "first"])
def test_a_step_that_is_not_finite_is_told_at_the_next_point(what):
    keeper, guard = fit(steps(100, **{what: [(slice(75, 80), math.nan)]}))
    assert [(verdict.kind, verdict.step) for verdict in guard.verdicts] == [("non_finite_step", 79)]
    assert guard.verdicts[0].since == 75
    assert values(keeper, "nonfinite_steps")[79] == 5
    assert guard.verdicts[0].layer == ("first" if what == "first" else "all")


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_steps_without_a_loss_or_a_gradient_end_nothing():
    class Odd(Planted):
        def training_step(self, batch, batch_idx):
            if batch_idx == 30:
                self.first.weight.requires_grad_(False)
            return None if batch_idx % 7 == 3 else super().training_step(batch, batch_idx)

    rows = steps(60)
    keeper, _ = fit(rows, Odd())
    kept = [i for i in range(40, 50) if i % 7 != 3]
    assert values(keeper, "grad_norm")[49] == pytest.approx(rows[kept, 2].mean(), rel=1e-6)
    assert values(keeper, "loss")[49] == pytest.approx(rows[kept, 0].mean(), rel=1e-6)


@pytest.mark.parametrize(("argument", "value"), [("threshold", 0), ("threshold", math.nan), ("limit", 0)])
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`.* got"):
        StabilityMonitor(**{argument: value})


def test_flattened_gradients_are_refused():
    trainer = Trainer(**QUIET, logger=False)
    trainer.strategy.__class__ = FSDPStrategy  # a real one needs an accelerator
    with pytest.raises(MisconfigurationException, match=r"flattened gradients.*fully_shard"):
        StabilityMonitor().start(trainer, Toy())


def held(thing):
    """How many tensors it holds, and what is in it."""
    if isinstance(thing, torch.Tensor):
        return 1
    if isinstance(thing, list | tuple | set | deque):
        return sum(map(held, thing))
    if isinstance(thing, dict):
        return sum(map(held, thing.values()))
    return held(vars(thing)) if type(thing).__module__.startswith("lightning_collapse") else 0


@pytest.mark.parametrize("manual", [False, True])
def test_nothing_is_kept_where_no_point_comes(manual):
    class Look(Callback):
        alive = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx in (9, 39):
                self.alive += (held(monitor),)

    class Steps(Planted):
        def training_step(self, batch, batch_idx):
            if self.automatic_optimization:
                return super().training_step(batch, batch_idx)
            self.manual_backward(self.loss(*batch))
            self.optimizers().step()
            return None

    look, monitor = Look(), StabilityMonitor()
    batches = [tuple(row) for row in torch.tensor(steps(40), dtype=torch.float32)]
    trainer = Trainer(**{**QUIET, "logger": False, "log_every_n_steps": 0}, callbacks=[monitor, look])
    trainer.fit(Steps(manual), DataLoader(batches, batch_size=None))
    assert look.alive[0] == look.alive[1]


class Overwrite(Callback):
    """Writes into the memory of a loss that is done with, as the next replay of a CUDA graph does."""

    def on_before_backward(self, trainer, pl_module, loss):
        self.loss = loss.detach()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.loss.fill_(math.nan)


def test_a_loss_is_known_after_its_memory_was_written_to():
    found = []
    for others in ([], [Overwrite()]):
        keeper = PointKeeper()
        watchers = [StabilityMonitor(every_n_steps=4), FirstNonFinite(every_n_steps=4), keeper, *others]
        data = DataLoader([tuple(map(float, row)) for row in steps(8)], batch_size=None)
        Trainer(**QUIET, logger=False, callbacks=watchers).fit(Planted(), data)
        found.append([(point.key, point.step, str(point.value)) for point in keeper.points])
    assert found[0] == found[1] != []
