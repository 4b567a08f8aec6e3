"""What every registered monitor must do, whatever it watches."""

import gc
import importlib
import inspect
import math
import pickle
import pkgutil
import weakref
from copy import deepcopy
from functools import cache

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import lightning_collapse
from lightning_collapse import CollapseGuard, CollapseMonitor, Monitor, callbacks
from lightning_collapse.utilities.registry import CURVES, MONITORS
from tests.monitors import ARGUMENTS
from tests.toys import QUIET, MemoryLogger, PointKeeper, fit, weights

OURS = {name: cls for name, cls in MONITORS.items() if cls.__module__.startswith("lightning_collapse.")}
each = pytest.mark.parametrize("name", OURS)
quiet = pytest.mark.filterwarnings("ignore:.*(no attention|returns 3 numbers for 1 targets)")


def halves(output):
    return output[..., :1], output[..., 1:2]


def tokens(module, args, output):
    return output


OF_MODEL = {
    "LatentMonitor": {"layers": ["head"], "read": halves},
    "StateMonitor": {"layers": ["embed"], "read": tokens},
}
"""Arguments that the model of this battery needs."""


def make(name, every_n_steps=2):
    return OURS[name](**ARGUMENTS.get(name, {}), **OF_MODEL.get(name, {}), every_n_steps=every_n_steps)


class Quantizer(nn.Module):
    """Vector quantization by gradients alone, of rows about their mean, so that more than one code is chosen."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(0.02 * torch.randn(6, 8))

    def forward(self, rows):
        rows = rows - rows.mean(dim=0)
        found = self.codes[torch.cdist(rows, self.codes).argmin(dim=1)]
        return rows + (found - rows).detach(), (found - rows.detach()).square().mean()


class Model(LightningModule):
    """Attention, experts, a rectifier, a codebook and a head: there is something to watch for every monitor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.quantizer, self.head = Quantizer(), nn.Linear(8, 3)
        self.kept = []

    def forward(self, x):
        x = self.embed(x)
        features = self.body(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))
        weight, chosen = self.gate(features).softmax(dim=-1).topk(2, dim=-1)
        mixed = torch.stack([expert(features) for expert in self.experts], dim=1)
        features = features + (weight.unsqueeze(2) * mixed.gather(1, chosen.unsqueeze(2).expand(-1, -1, 8))).sum(dim=1)
        self.kept.append(weakref.ref(features))
        features, self.pull = self.quantizer(features)
        return self.head(features)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1]) + self.pull
        self.pull = None
        if not self.trainer.barebones:
            self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def batches(count=8, size=16):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, size, 5, 6, generator=generator), torch.arange(count * size).view(count, size) % 3
    return list(zip(x, y, strict=True))


def run(*callbacks, data=None, **kwargs):
    torch.manual_seed(0)
    model = Model()
    data = batches() if data is None else data
    trainer = fit(model, callbacks, DataLoader(data, batch_size=None), **{"log_every_n_steps": 1, **kwargs})
    return model, trainer


@cache
def unwatched(count=8):
    """The model after a fit of so many batches that nobody has watched, and the random state."""
    return run(data=batches()[:count])[0], torch.random.get_rng_state()


@each
def test_it_is_exported(name):
    assert name in callbacks.__all__
    assert name in lightning_collapse.__all__


def test_no_monitor_is_forgotten():
    """A monitor that is written but neither registered nor exported would pass every test here unseen."""
    for module in pkgutil.walk_packages(lightning_collapse.__path__, "lightning_collapse."):
        for name, found in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(found, Monitor) and found is not Monitor and not inspect.isabstract(found):
                assert OURS.get(name) is found


@each
@quiet
def test_it_draws_what_it_declares_and_says_so(name):
    keeper, monitor = PointKeeper(), make(name)
    run(monitor, keeper, accumulate_grad_batches=2)
    families = {monitor.family} | {curve.family for curve in monitor.declares if curve.family}
    points = [point for point in keeper.points if point.family in families]
    assert points
    known = {(curve.family or monitor.family, curve.name) for curve in monitor.declares}
    known |= {(monitor.family, curve) for curve in monitor.curves}
    assert {(point.family, point.measure) for point in points} <= known
    for curve in monitor.declares:
        assert CURVES[f"{curve.family or monitor.family}/{curve.name}"].reads == curve.reads
        assert curve.line in monitor.__doc__
    assert "{curves}" not in monitor.__doc__


@each
@quiet
def test_its_first_point_is_of_the_network_as_it_was_made(name):
    keeper = PointKeeper()
    run(make(name, 4), keeper)
    assert sorted({point.step for point in keeper.points}) == [0, 3, 7]


@each
@pytest.mark.parametrize("bad", [0, -1, 2.5, "often"])
def test_a_bad_cadence_is_refused(name, bad):
    with pytest.raises(ValueError, match=r"`every_n_steps`.* got"):
        make(name, bad)


@each
@quiet
def test_nothing_of_the_training_changes(name):
    plain, state = unwatched()
    (watched, _), again = run(make(name)), torch.random.get_rng_state()
    assert torch.equal(state, again)
    assert weights(plain).keys() == weights(watched).keys()
    assert all(torch.equal(value, weights(watched)[key]) for key, value in weights(plain).items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in watched.modules())
    assert "training_step" not in vars(watched)


@each
@quiet
@pytest.mark.filterwarnings("ignore:.*(failed with ValueError|did not run|received no labelled|there were no rows)")
@pytest.mark.parametrize("method", ["before_batch", "after_batch", "read", "points", "draw"])
def test_what_fails_is_said_once_and_training_goes_on(name, method):
    def broken(*args, **kwargs):
        raise ValueError("boom")

    plain, _ = unwatched(4)  # three points, so that it fails more than once
    monitor = make(name)
    setattr(monitor, method, broken)
    with pytest.warns(UserWarning, match=rf"`{name}`: .* failed with ValueError\('boom'\).*Training goes on") as said:
        watched, trainer = run(monitor, data=batches()[:4])
    assert trainer.state.finished
    assert sum("boom" in str(w.message) for w in said) == 1
    assert all(torch.equal(value, weights(watched)[key]) for key, value in weights(plain).items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in watched.modules())


@each
@quiet
@pytest.mark.filterwarnings("ignore:.*(no labelled rows|no rows of)")
def test_rows_that_are_no_numbers_end_nothing(name):
    data = batches()
    for x, _ in data[2:4]:
        x[:4] = math.nan
    for x, _ in data[6:]:
        x.fill_(math.inf)
    keeper = PointKeeper()
    _, trainer = run(make(name), keeper, data=data)
    assert trainer.state.finished
    assert keeper.points[-1].step == 7


class Waits:
    """Counts what waits for the device, in steps that end in no point."""

    WAYS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")

    def __init__(self, monkeypatch):
        self.on, self.seen = False, []
        for way in self.WAYS:
            original = getattr(torch.Tensor, way)

            def waiting(tensor, *args, original=original, way=way, **kwargs):
                if self.on:
                    self.seen.append((way, tuple(tensor.shape)))
                return original(tensor, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, way, waiting)


@each
@quiet
def test_nothing_waits_for_the_device_between_points(name, monkeypatch):
    waits, monitor = Waits(monkeypatch), make(name, 4)
    hooks = ("on_train_batch_start", "on_before_zero_grad", "on_after_backward", "on_before_optimizer_step")
    for hook in (*hooks, "on_train_batch_end"):
        original = getattr(monitor, hook)

        def listening(trainer, *args, original=original):
            due = (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % 4 == 0
            waits.on = trainer.fit_loop.epoch_loop._batches_that_stepped > 0 and not due
            original(trainer, *args)
            waits.on = False

        monkeypatch.setattr(monitor, hook, listening)
    run(monitor, logger=False)
    assert waits.seen == []


class Deterministic(TorchDispatchMode):
    """Refuses what torch refuses on CUDA under `use_deterministic_algorithms(True)`, and knows no other way to do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        fractions = args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        refused = name in ("median", "nanmedian") and "dim" in func._overloadname
        refused |= name in ("kthvalue", "histc", "put", "put_") or (name in ("cumsum", "cumsum_") and fractions)
        if refused:
            raise RuntimeError(f"{func} does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


@each
@quiet
@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled")
def test_a_trainer_may_be_deterministic(name, monkeypatch):
    monitor = make(name)
    for hook in ("on_before_backward", "on_before_optimizer_step", "on_train_batch_end"):
        original = getattr(monitor, hook)

        def refusing(*args, original=original):
            with Deterministic():
                original(*args)

        monkeypatch.setattr(monitor, hook, refusing)
    try:
        run(monitor, logger=False, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert monitor.contained.failed == {}


@each
@quiet
def test_no_graph_and_no_activation_is_kept(name):
    class Look(Callback):
        alive = 0

        def on_train_batch_start(self, trainer, pl_module, *args):
            gc.collect()
            self.alive = max(self.alive, sum(features() is not None for features in pl_module.kept))

    look = Look()
    run(look, make(name))
    assert look.alive == 0


@each
@quiet
def test_a_copy_of_the_model_carries_nothing_of_it(name):
    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.kept = []
            self.body = pickle.loads(pickle.dumps(pl_module.body))
            copy = deepcopy(pl_module.body)
            copy(torch.zeros(2, 8))
            assert not any(part._forward_hooks or part._forward_pre_hooks for part in copy.modules())

    plain, copies = PointKeeper(), PointKeeper()
    run(make(name), plain)
    run(make(name), Copies(), copies)
    assert repr(plain.points) == repr(copies.points)


@each
@quiet
def test_it_travels_before_and_after_a_fit(name):
    monitor = pickle.loads(pickle.dumps(make(name)))
    model, _ = run(monitor)
    model.kept.append(lambda: None)  # so that it cannot be pickled: nothing may hold the model any more
    for method in ("log", "log_dict"):  # Lightning's own hold the model
        delattr(monitor, method)
    again = deepcopy(pickle.loads(pickle.dumps(monitor)))
    assert again.state_key == monitor.state_key


@each
@quiet
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*in the middle of an epoch")
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not(name, tmp_path):
    # the loader of a half-done epoch starts anew: every batch is the same
    data = batches(1) * 6

    def part(keeper, **kwargs):
        torch.manual_seed(0)
        save = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        callbacks, loader = [make(name, 4), keeper, save], DataLoader(data, batch_size=None)
        options = {**QUIET, "enable_checkpointing": True, "max_epochs": 2, "logger": MemoryLogger()}
        trainer = Trainer(**options, log_every_n_steps=1, callbacks=callbacks)
        trainer.fit(Model(), loader, **kwargs)

    whole, rest = PointKeeper(), PointKeeper()
    part(whole)
    part(rest, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert {point.step for point in rest.points} <= {point.step for point in whole.points}
    found = {(point.key, point.step): point.value for point in rest.points}
    expected = {(point.key, point.step): point.value for point in whole.points if point.step > 4}
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)
    torch.load(tmp_path / "step=5.ckpt", weights_only=True)


@each
@quiet
def test_two_of_a_kind(name):
    keeper = PointKeeper()
    first, second = make(name, 2), make(name, 3)
    assert first.state_key != second.state_key
    run(first, second, keeper)
    assert {point.step for point in keeper.points} == {0, 1, 2, 3, 5, 7}


@each
@quiet
@pytest.mark.filterwarnings("ignore:.*the fit ended before the first point")
def test_a_fit_may_be_short_and_bare(name):
    keeper = PointKeeper()
    run(make(name, 100), keeper, max_steps=3)
    assert {point.step for point in keeper.points} == {0}
    _, trainer = run(make(name), fast_dev_run=True, logger=True)
    assert trainer.state.finished
    bare = Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=[make(name)])
    bare.fit(Model(), DataLoader(batches(2), batch_size=None))
    assert bare.state.finished


@each
@quiet
@pytest.mark.filterwarnings("ignore:.*the fit ended before the first point")
def test_its_curves_are_there_when_the_first_epoch_ends(name):
    keeper = PointKeeper()
    run(make(name, 100), keeper, max_steps=1)
    curve = next(point.key for point in keeper.points if math.isfinite(point.value))
    stop = EarlyStopping(monitor=curve, check_on_train_epoch_end=True, patience=100)
    _, trainer = run(make(name, 100), stop)
    assert trainer.state.finished


def test_a_guard_may_stand_before_the_monitors():
    guard = CollapseGuard(action="log")
    _, trainer = run(guard, CollapseMonitor(every_n_steps=1))
    assert trainer.state.finished
    assert guard.verdicts == []


class Odd(Monitor):
    """Returns what is no reading: a matrix."""

    def start(self, trainer, pl_module):
        pass

    def read(self, trainer, pl_module):
        return {("a", "b"): torch.zeros(2, 2)}


def test_odd_readings_of_one_monitor_leave_the_others_theirs():
    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="`Odd`: bringing readings to the host failed"):
        _, trainer = run(CollapseMonitor(["body"], every_n_steps=4), Odd(every_n_steps=4), keeper)
    assert trainer.state.finished
    assert [point.step for point in keeper.points if point.measure == "effective_rank"] == [0, 3, 7]
