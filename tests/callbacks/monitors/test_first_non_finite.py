"""The first NaN is named: in every row of the table of producers, in sampled steps, in others, and as the run dies."""

import json
import logging
from functools import cache

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_collapse import CollapseGuard, FirstNonFinite
from lightning_collapse.functional import Cause
from tests.toys import PointKeeper, fit, weights

AT = 5
"""Batch of the fault; a point every second step falls on it, one every fourth does not."""


class Attention(nn.Module):
    """A softmax as a function: a row that is masked as a whole is 0/0."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x, mask):
        scores = self.project(x) @ x.transpose(-1, -2) + mask
        return scores.softmax(dim=-1) @ x


class Square(nn.Module):
    def forward(self, x):
        return x * x


class Faulty(LightningModule):
    """Five layers, of which ``fault`` does something at step :data:`AT`."""

    def __init__(self, fault=None, at=AT):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
        self.drop, self.norm, self.square = nn.Dropout(0.5), nn.BatchNorm1d(4), Square()
        self.attention = Attention()
        self.mean = MeanMetric(nan_strategy="disable")
        self.fault, self.at, self.ran = fault, at, []

    def training_step(self, batch, batch_idx):
        now = self.global_step == self.at
        self.ran.append(batch_idx)
        x = self.drop(self.norm(self.layers(batch)))
        mask = torch.full((4, 4), -torch.inf).triu(1)
        if now and self.fault == "masked row":
            mask[:] = -torch.inf
        x = self.attention(x.view(2, 4, 4), mask).flatten(0, 1)
        if now and self.fault == "between modules":
            x = self.square(x / (x - x))
        loss = x.square().mean()
        if now and self.fault == "sqrt at 0":
            loss = loss + self.square((self.layers(batch) * 0).sqrt()).sum()
        if now and self.fault == "overflow":
            loss = loss + self.square(self.layers(batch) * 1e30).mean()
        if now and self.fault == "exception":
            raise ValueError(f"the loss is {loss * torch.nan}")
        if now and self.fault == "loss":
            loss = loss * torch.tensor(0.0).log()
        self.log("loss", self.mean(loss.detach()))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.fault == "update" and self.global_step == self.at:
            self.layers[2].weight.data[1, 1] = torch.nan

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Manual(Faulty):
    def __init__(self, fault=None, at=AT):
        super().__init__(fault, at)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def data(fault=None, count=12):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 4, generator=generator) for _ in range(count)]
    if fault == "data":
        batches[AT][3, 2] = torch.nan
    return DataLoader(batches, batch_size=None)


def run(fault=None, every_n_steps=2, replay=False, model=Faulty, callbacks=(), watched=True, **options):
    """Fit, and return the module and all points."""
    keeper, lit = PointKeeper(), model(fault)
    monitors = [FirstNonFinite(replay, every_n_steps)] if watched else []
    fit(lit, [*monitors, *callbacks, keeper], data(fault), **options)
    return lit, keeper


def causes(keeper):
    """What was found: layer, cause and step."""
    found = {}
    for point in keeper.points:
        if point.measure == "cause" and point.value:
            step = next(p.value for p in keeper.points if p[:2] == point[:2] and p.measure == "step")
            found[point.layer] = Cause(int(point.value)), int(step)
    return found


FAULTS = {
    "data": ("batch", Cause.DATA),
    "update": ("layers.2", Cause.UPDATE),
    "overflow": ("square", Cause.OVERFLOW),
    "masked row": ("attention", Cause.UNDEFINED),
    "between modules": ("training_step", Cause.UNDEFINED),
    "sqrt at 0": ("training_step", Cause.BACKWARD),
    "loss": ("training_step", Cause.UNDEFINED),
}
each = pytest.mark.parametrize("fault", FAULTS)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="lightning_collapse")
    return lambda: [r.getMessage() for r in caplog.records if "`FirstNonFinite`" in r.getMessage()]


@each
@pytest.mark.parametrize("model", [Faulty, Manual])
def test_a_step_that_is_measured_names_the_producer(fault, model, said):
    _, keeper = run(fault, model=model)
    layer, cause = FAULTS[fault]
    assert causes(keeper) == {layer: (cause, AT)}
    assert len(said()) == 1
    assert f"at step {AT}, made by `{layer}`: {cause.words}" in said()[0]


@each
def test_replay_names_it_in_a_step_that_is_not_measured(fault, said):
    _, keeper = run(fault, every_n_steps=4, replay=True)
    layer, cause = FAULTS[fault]
    assert causes(keeper) == {layer: (cause, AT)}
    assert len(said()) == 1


@each
@pytest.mark.parametrize("model", [Faulty, Manual])
def test_without_replay_it_is_said_what_is_known(fault, model, said):
    _, keeper = run(fault, every_n_steps=4, model=model)
    words = {
        "data": "made by `batch`: data; the batch holds it already",
        "sqrt at 0": "its loss is finite, and gradients of weights are not, 5 of 6 that are looked at, that of"
        " `layers.4.weight` first",
    }
    cause = Cause.DATA if fault == "data" else Cause.UNSEEN
    assert causes(keeper) == {"batch" if fault == "data" else "training_step": (cause, AT)}
    assert len(said()) == 1
    assert words.get(fault, "its forward pass made it, from weights whose gradients were finite") in said()[0]
    assert "all was finite at step 3" in said()[0]
    assert "hold NaN or infinity, `layers.0.weight` first" in said()[0] or fault == "update"
    assert "replay=True" in said()[0]


def test_a_batch_that_holds_nan_without_harm_is_not_blamed():
    class Sparse(Faulty):
        """Reads some columns; the others may hold anything."""

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:, :4], batch_idx)

    batches, keeper = [torch.cat([x, x[:, :1] * torch.nan], dim=1) for x in data().dataset], PointKeeper()
    fit(Sparse("between modules"), [FirstNonFinite(every_n_steps=4), keeper], DataLoader(batches, batch_size=None))
    assert causes(keeper) == {"training_step": (Cause.UNSEEN, AT)}


def test_nothing_is_found_in_a_healthy_run_with_masks(said):
    _, keeper = run()
    assert causes(keeper) == {}
    assert said() == []
    last = {point.measure: point.value for point in keeper.points}
    assert last.keys() == {"steps", "first_call", "headroom"}
    assert (last["steps"], last["first_call"]) == (0, -1)
    assert 100 < last["headroom"] < 129


def test_the_index_counts_calls_in_the_order_in_which_they_end():
    _, keeper = run("update")
    assert [p.value for p in keeper.curve("nonfinite/all/first_call")] == [-1, -1, -1, 2, 2, 2, 2]


@cache
def unwatched(fault):
    """The module after a fit that nobody has watched, and the random state."""
    return run(fault, watched=False)[0], torch.random.get_rng_state()


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_nothing_of_the_training_changes(fault, replay):
    plain, state = unwatched(fault)
    for every in (1, 4):
        watched, _ = run(fault, every, replay)
        assert torch.equal(state, torch.random.get_rng_state())
        for name, value in weights(plain).items():
            assert torch.equal(value.nan_to_num(7), weights(watched)[name].nan_to_num(7)), name
        assert watched.ran == plain.ran
        assert watched.mean.update_count == plain.mean.update_count
        assert watched.trainer.callback_metrics["loss"].nan_to_num(7) == plain.trainer.callback_metrics[
            "loss"
        ].nan_to_num(7)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in watched.modules())
        assert not {"training_step", "log", "log_dict"} & vars(watched).keys()


class Strict(Attention):
    """Checks itself what it would return."""

    def forward(self, x, mask):
        out = super().forward(x, mask)
        if out.isnan().any():
            raise ValueError("NaN")
        return out


@pytest.mark.parametrize(("every", "replay"), [(1, False), (2, True), (4, False), (4, True)])
def test_a_module_that_raises_before_it_returns_is_not_blamed(every, replay, said):
    lit = Faulty("masked row")
    lit.attention = Strict()
    with pytest.raises(ValueError, match="NaN"):
        fit(lit, [FirstNonFinite(replay, every)], data())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in lit.modules())
    assert said() == []


class Checks(Faulty):
    """Raises where a NaN arrives, as distributions do that check their arguments."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if loss.isnan():
            raise ValueError("the loss is NaN")
        return loss


@pytest.mark.parametrize(("every", "replay"), [(1, False), (2, False), (4, True)])
def test_an_exception_over_a_nan_is_explained(every, replay, said):
    with pytest.raises(ValueError, match="the loss is NaN"):
        run("masked row", every, replay, Checks)
    assert len(said()) == 1
    assert "made by `attention`: undefined operation" in said()[0]


def test_an_exception_over_something_else_is_not(said):
    with pytest.raises(ValueError, match="the loss is nan"):
        run("exception", 2, True)
    assert said() == []


@pytest.mark.filterwarnings("ignore:.*the fit ended before the first point")
@pytest.mark.parametrize("every", [4, 100])
def test_a_fit_that_ends_before_the_next_point_tells_it(every, said):
    _, keeper = run("data", every, max_steps=AT + 1)
    assert causes(keeper) == {"batch": (Cause.DATA, AT)}
    assert len(said()) == 1


def test_after_an_alarm_every_step_is_measured_until_it_is_calm(said):
    class Skips(Faulty):
        """Loses batches whose loss is not finite, as a step that is skipped does."""

        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            closure()
            if all(p.grad is None or p.grad.isfinite().all() for p in self.parameters()):
                optimizer.step()

    batches, keeper = data("data", 40).dataset, PointKeeper()
    batches[9] = batches[AT]
    fit(Skips(), [FirstNonFinite(every_n_steps=4), keeper], DataLoader(batches, batch_size=None))
    assert causes(keeper) == {"batch": (Cause.DATA, AT)}
    assert keeper.curve("nonfinite/batch/cause")[-1].value == 0
    assert keeper.curve("nonfinite/all/steps")[-1].value == 2
    assert all(f"step {step}, made by `batch`: data" in words for step, words in zip((AT, 9), said(), strict=True))
    assert "tensor 0 of the batch" in said()[1]  # which was measured


def test_the_table_is_text_and_valid_json_beside_the_logs(tmp_path, said):
    run("overflow", 1, logger=CSVLogger(tmp_path, name="run"))
    [file] = tmp_path.glob("run/version_0/nonfinite/*.json")
    assert file.name == f"step={AT:08d}.json"

    def refuse(text):
        raise AssertionError(text)

    record = json.loads(file.read_text(), parse_constant=refuse)
    assert (record["layer"], record["cause"], record["step"], record["rank"]) == ("square", "overflow", AT, 0)
    assert record["steps"] == list(range(AT + 1))
    *before, last = record["rows"]
    assert len(before) <= 20
    assert last["values"][-1] == "inf"
    assert last["verdict"] == "overflow: `square`"
    assert last["dtype"] == "float32"
    assert before[-1]["values"][-1] > 1e28
    text = (tmp_path / "run" / "version_0" / "texts.md").read_text()
    assert "## nonfinite/first" in text
    assert "| square (Square)" in text
    assert str(file) in said()[0]


def test_a_folder_that_cannot_be_written_costs_a_warning_and_not_the_word(tmp_path, said):
    class InTheWay(PointKeeper):
        def on_train_start(self, trainer, pl_module):
            (tmp_path / "run" / "version_0").mkdir(parents=True, exist_ok=True)
            (tmp_path / "run" / "version_0" / "nonfinite").write_text("in the way")

    with pytest.warns(UserWarning, match="`FirstNonFinite`: drawing failed"):
        run("data", callbacks=[InTheWay()], logger=TensorBoardLogger(tmp_path, name="run"))
    assert len(said()) == 1


@pytest.mark.parametrize("fault", ["data", "masked row"])
def test_the_guard_says_who_made_it_without_another_monitor(fault):
    guard = CollapseGuard(action="log")
    run(fault, callbacks=[guard])
    [verdict] = guard.verdicts
    layer, _ = FAULTS[fault]
    assert (verdict.kind, verdict.layer, verdict.since) == ("non_finite_origin", layer, AT)
    assert str(verdict).startswith(f"The first NaN or infinity comes from `{layer}`.")


class Half(LightningModule):
    """An activation grows by a factor of four a step, up to 65,504."""

    def __init__(self):
        super().__init__()
        self.first, self.grow, self.last = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x = self.grow(self.first(batch).detach().sign() * 4.0**self.global_step)
        return self.last(x / x.abs().max().clamp_min(1).detach()).float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_an_overflow_of_float16_shows_in_the_headroom_before(said):
    keeper = PointKeeper()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        same = DataLoader(data().dataset[:1] * 12, batch_size=None)
        fit(Half(), [FirstNonFinite(every_n_steps=1), keeper], same, precision="16-true")
    headroom = [point.value for point in keeper.curve("nonfinite/all/headroom")]
    assert headroom[1] - headroom[5] == pytest.approx(8, abs=0.1)  # 4 ** 4
    [(layer, (cause, step))] = causes(keeper).items()
    assert (layer, cause) == ("training_step", Cause.OVERFLOW)
    assert headroom[step - 1] < 3
    assert "float16" in said()[0]


class Recomputed(Faulty):
    def training_step(self, batch, batch_idx):
        x = checkpoint(self.layers, batch, use_reentrant=False)
        return self.square(x).mean()


def test_what_checkpointing_computes_again_does_not_count():
    monitor = FirstNonFinite(every_n_steps=1)
    names = []
    keep = PointKeeper()

    class Look(PointKeeper):
        def on_train_batch_end(self, trainer, pl_module, *args):
            names.append([call.name for call in monitor._frames.frame.calls])

    fit(Recomputed(), [Look(), monitor, keep], data(count=2))
    assert names[0] == ["training_step", "layers", *(f"layers.{i}" for i in range(5)), "square"]


class Teacher(Faulty):
    """A part in evaluation mode, which torch computes in another order where anybody listens."""

    def __init__(self, fault=None, at=AT):
        super().__init__(fault, at)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.teacher = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.teacher.eval()
        with torch.no_grad():
            target = self.teacher(batch.view(2, 4, 4)).flatten(0, 1)
        return super().training_step(batch, batch_idx) + (self.layers(batch) - target).square().mean()


def test_a_part_in_evaluation_mode_keeps_its_way_through_torch():
    plain, _ = run(model=Teacher, watched=False)
    for replay in (False, True):
        watched, _ = run(None, 1, replay, Teacher)
        assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())


def test_passes_of_other_callbacks_do_not_count(said):
    class Probes(PointKeeper):
        def on_train_batch_start(self, trainer, pl_module, *args):
            pl_module.layers(torch.full((2, 4), torch.nan))

        on_before_backward = on_after_backward = on_train_batch_start

    _, keeper = run("data", 1, callbacks=[Probes()])
    assert causes(keeper) == {"batch": (Cause.DATA, AT)}


class Scaled(Faulty):
    """Gradients overflow at every scale above the limit."""

    limit = 1.0

    def training_step(self, batch, batch_idx):
        loss = self.square(self.layers(batch)).mean()
        scale = self.trainer.precision_plugin.scaler._scale
        if scale is not None and scale > self.limit:
            loss = loss + Blow.apply(self.layers[0].weight.sum())
        return loss


class Blow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def scaled(limit, start):
    model, keeper = Scaled(), PointKeeper()
    model.limit = limit
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=start))
    callbacks = [FirstNonFinite(every_n_steps=2), keeper]
    fit(model, callbacks, data(), plugins=[plugin])
    return keeper


@pytest.mark.filterwarnings("ignore:.*lr_scheduler", "ignore:.*float16")
def test_a_scaler_that_looks_for_its_scale_is_no_failure(said):
    keeper = scaled(limit=2.0**6, start=2.0**10)
    assert causes(keeper) == {}
    assert keeper.curve("nonfinite/all/halvings")[-1].value == 4
    assert said() == []


@pytest.mark.filterwarnings("ignore:.*lr_scheduler", "ignore:.*float16")
@pytest.mark.parametrize("start", [2.0**16, 2.0**2])
def test_a_scale_that_falls_without_end_is_one(start, said):
    keeper = scaled(limit=0.0, start=start)
    [(_, (cause, _))] = causes(keeper).items()
    assert cause == Cause.BACKWARD
    assert "the loss scale fell" in said()[0]


class Tower(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)


class Compiled(Faulty):
    """One part wrapped, one compiled in place."""

    def __init__(self, fault=None, at=AT):
        super().__init__(fault, at)
        self.layers = Tower(self.layers)

    def configure_model(self):
        self.attention = torch.compile(self.attention, backend="eager")
        self.layers.compile(backend="eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("fault", ["masked row", "data"])
@pytest.mark.parametrize("replay", [False, True])
def test_compiled_parts_are_seen_from_outside(fault, replay):
    torch.compiler.reset()
    counts = torch._dynamo.utils.counters
    counts.clear()
    run(None, 2, replay, Compiled)
    graphs = counts["stats"]["unique_graphs"]
    torch.compiler.reset()
    counts.clear()
    _, keeper = run(fault, 4 if replay else 2, replay, Compiled)
    assert counts["stats"]["unique_graphs"] == graphs == 2  # the two parts
    layer, cause = FAULTS[fault]
    assert causes(keeper) == {layer: (cause, AT)}
    torch.compiler.reset()


def test_what_cannot_be_repeated_is_refused_at_the_start():
    with pytest.raises(MisconfigurationException, match=r"`FirstNonFinite\(replay=True\)`.*Leave `replay` away"):
        fit(Manual(), [FirstNonFinite(replay=True)], data())
    with pytest.raises(ValueError, match="`replay` must be True or False, got 'yes'"):
        FirstNonFinite(replay="yes")


def test_accumulation_repeats_the_micro_batch_that_failed(said):
    keeper = PointKeeper()
    plain, lit = Faulty("data", at=-1), Faulty("data", at=-1)
    fit(plain, [], data("data"), accumulate_grad_batches=4)
    fit(lit, [FirstNonFinite(True, 3), keeper], data("data"), accumulate_grad_batches=4)
    assert causes(keeper) == {"batch": (Cause.DATA, 1)}
    for name, value in weights(plain).items():
        assert torch.equal(value.nan_to_num(7), weights(lit)[name].nan_to_num(7)), name
