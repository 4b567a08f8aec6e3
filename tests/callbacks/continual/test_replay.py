"""Rehearsal through both doors is what one would write by hand, and nobody else notices."""

from __future__ import annotations

import pickle
from copy import deepcopy
from importlib import import_module
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import (
    FPF,
    CollapseMonitor,
    ContinualMixin,
    Distillation,
    Replay,
    TaskBoundary,
    WeightPenalty,
    fit_tasks,
)
from lightning_collapse.penalties import EWC
from lightning_collapse.replay import ReplayBuffer
from tests.continual import Learner, held_out, task, training
from tests.toys import QUIET, MemoryLogger, PointKeeper, weights


class Net(LightningModule):
    """Six numbers in, three classes out, and no random numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 3)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(len(x))
        return cross_entropy(self(x), y)

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Mixed(ContinualMixin, Net):
    """The other door."""

    def __init__(self) -> None:
        super().__init__()
        self.set_replay(ReplayBuffer(10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rehearsal = self.replay_batch()
        if rehearsal is not None:
            batch = [torch.cat(pair) for pair in zip(batch, rehearsal, strict=True)]
        return super().training_step(batch, batch_idx)


class ByHand(Net):
    """Experience replay written out: rows come from the buffer before it is offered those of the batch."""

    task = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows = [ReplayBuffer(10)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rehearsal = self.rows[0].sample(len(batch[0])) if self.task else None
        self.rows[0].add(batch)
        if rehearsal is not None:
            batch = [torch.cat(pair) for pair in zip(batch, rehearsal, strict=True)]
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self.task += 1


class Manual(Net):
    """Two optimizers, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


def loader(seed: int = 0) -> DataLoader:
    return DataLoader(task(seed, n=36), batch_size=8)  # the last batch is short


def fit(model: Any, *callbacks: Any, data: Any = None, ckpt_path: Any = None, **kwargs: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "logger": MemoryLogger(), "callbacks": list(callbacks), **kwargs})
    data = DataLoader(data, batch_size=None) if isinstance(data, list) else data
    trainer.fit(model, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def tasks(model: Any, *callbacks: Any, count: int = 3, **kwargs: Any) -> Any:
    for index in range(count):
        fit(model, *callbacks, data=loader(index), **kwargs)
    return model


def same(first: Any, second: Any) -> bool:
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def every_row(buffer: ReplayBuffer) -> Tensor:
    return torch.cat([batch[0] for batch in buffer.loader(100, shuffle=False)])


@pytest.mark.parametrize(
    "kwargs", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}]
)
def test_both_doors_are_replay_written_out(kwargs: Any) -> None:
    buffer = ReplayBuffer(10)
    ours, mixed, theirs = tasks(Net(), Replay(buffer), **kwargs), tasks(Mixed(), **kwargs), tasks(ByHand(), **kwargs)
    assert same(ours, theirs)
    assert same(mixed, theirs)
    assert not same(ours, tasks(Net(), **kwargs))
    assert ours.seen == mixed.seen == theirs.seen == [8, 8, 8, 8, 4, *2 * (16, 16, 16, 16, 8)]
    assert torch.equal(every_row(buffer), every_row(theirs.rows[0]))
    assert torch.equal(every_row(buffer), every_row(mixed.replay.buffer))
    assert list(mixed.state_dict()) == list(Net().state_dict())


def test_manual_optimization_and_two_optimizers() -> None:
    model = tasks(Manual(), Replay(ReplayBuffer(10), batch_size=4, from_start=True), count=2)
    assert model.seen == [8, 12, 12, 12, 8, 12, 12, 12, 12, 8]


@pytest.mark.parametrize(("policy", "storage"), [("reservoir", "host"), ("class_ring", "device")])
def test_rows_that_are_only_kept_change_nothing(policy: Any, storage: Any) -> None:
    """Neither weights nor random numbers, beside a monitor and a penalty that passes over the data too."""
    buffer = ReplayBuffer(10, policy=policy, storage=storage)
    models = []
    for callbacks in ([], [Replay(buffer, batch_size=0)]):
        torch.manual_seed(1)
        model = Learner()
        shared = WeightPenalty(EWC(weight=1.0)), CollapseMonitor(every_n_steps=2)
        for index in range(2):
            fit(model, *callbacks, *shared, data=training(index))
        models.append((model, torch.rand(1)))
    assert same(models[0][0], models[1][0])
    assert torch.equal(models[0][1], models[1][1])
    assert buffer.seen == 96  # of the training alone


class Watching(Callback):
    """Looks at what callbacks are given, and at copies of the module in mid-fit."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        copies = deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))
        assert not any("batch_transfer" in name for copy in copies for name in vars(copy))


class Augmenting(Net):
    """Its hook changes batches in place, on the way."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].mul_(-2.0)
        return batch


class Data(LightningDataModule):
    """The same, as a hook of the data module, and tasks that follow."""

    task_index = 0

    def train_dataloader(self) -> DataLoader:
        return loader(self.task_index)

    def val_dataloader(self) -> DataLoader:
        return held_out(0)

    on_after_batch_transfer = Augmenting.on_after_batch_transfer

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("hooks", ["module", "data module"])
def test_all_see_one_batch_and_raw_rows_are_kept(hooks: str, storage: Any) -> None:
    buffer, watching = ReplayBuffer(100, storage=storage), Watching()
    model, replay = Augmenting() if hooks == "module" else Net(), Replay(buffer)
    for index in range(2):
        data: Any = loader(index) if hooks == "module" else Data()
        if hooks == "data module":
            data.task_index = index
        fit(model, watching, replay, data=data, limit_val_batches=2)
    own = torch.cat([task(index, n=36).tensors[0] for index in range(2)])
    if hooks == "data module" and storage == "device":
        own = own + 1  # behind its first hook
    kept = every_row(buffer)
    assert torch.equal(kept, own)  # as they came, in their order: nothing that was rehearsed, nothing of validation
    seen = watching.batches[-1][0]
    assert len(seen) == 8
    inputs = (own + 1 if hooks == "data module" and storage == "host" else own) * -2
    assert all((inputs == row).all(dim=1).any() for row in seen)
    assert "on_before_batch_transfer" not in vars(model)
    assert not any("batch_transfer" in name for name in vars(data))


class Saver(Callback):
    """Saves a checkpoint in the middle of a task."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
@pytest.mark.parametrize("door", ["callback", "mixin"])
def test_a_fit_that_is_killed_in_mid_task_goes_on(door: str, policy: Any, tmp_path: Any) -> None:
    def make() -> tuple[Any, list[Any]]:
        if door == "callback":
            return Net(), [Replay(ReplayBuffer(10, policy=policy))]
        model = Mixed()
        model.set_replay(ReplayBuffer(10, policy=policy))
        return model, []

    class Rest(DataLoader):
        """What a loader that knows where it was has left."""

        def __iter__(self) -> Any:
            batches = list(super().__iter__())
            return iter(batches[3:])

        def __len__(self) -> int:
            return 2

    whole, callbacks = make()
    fit(whole, *callbacks)
    first = callbacks[0] if callbacks else whole.replay
    fit(whole, *callbacks, Saver(tmp_path / "mid.ckpt"), data=loader(1))
    torch.load(tmp_path / "mid.ckpt", weights_only=True)
    resumed, callbacks = make()
    second = callbacks[0] if callbacks else resumed.replay
    fit(resumed, *callbacks, data=Rest(task(1, n=36), batch_size=8), ckpt_path=tmp_path / "mid.ckpt", max_epochs=1)
    assert resumed.seen == [16, 8]
    assert same(whole, resumed)
    assert torch.equal(*(every_row(replay.buffer) for replay in (first, second)))


def test_tasks_within_one_fit_and_curves() -> None:
    points, model, buffer = PointKeeper(), Net(), ReplayBuffer(9, policy="class_balanced")
    fit(
        model,
        TaskBoundary(every_n_epochs=1),
        Replay(buffer, batch_size=2),
        points,
        data=Data(),
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
    )
    assert model.seen == [8, 8, 8, 8, 4, *2 * (10, 10, 10, 10, 6)]
    assert [(p.step, p.value) for p in points.curve("replay/rows")] == [(5, 9), (10, 9), (15, 9)]
    assert points.curve("replay/classes")[-1].value == 3
    assert points.curve("replay/largest_share")[-1].value == pytest.approx(1 / 3)


def test_rows_without_labels_and_a_part_of_the_batch() -> None:
    class Autoencoder(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch["x"] if isinstance(batch, dict) else batch
            self.seen.append(len(x))
            return self(x).square().mean()

    points = PointKeeper()
    model = tasks_of(Autoencoder(), Replay(ReplayBuffer(5)), points, data=list(torch.randn(4, 6, 6)))
    assert model.seen == [6] * 4 + [11] * 4
    assert [p.value for p in points.curve("replay/rows")] == [5, 5]
    assert not points.curve("replay/classes")

    def combine(batch: Any, rehearsal: Any) -> Any:
        return {**batch, "x": torch.cat([batch["x"], rehearsal])}

    data = [{"x": torch.randn(6, 6), "names": ["a"] * 6, "kind": torch.arange(6) % 2} for _ in range(4)]
    buffer = ReplayBuffer(6, policy="class_balanced")
    chosen = Replay(
        buffer, batch_size=2, rows=lambda batch: batch["x"], labels=lambda batch: batch["kind"], combine=combine
    )
    model = tasks_of(Autoencoder(), chosen, data=data)
    assert model.seen == [6] * 4 + [8] * 4
    assert buffer.labels.bincount().tolist() == [3, 3]


def tasks_of(model: Any, *callbacks: Any, data: Any) -> Any:
    for _ in range(2):
        fit(model, *callbacks, data=data)
    return model


def test_herding_is_added_to_when_a_task_ends() -> None:
    buffer = ReplayBuffer(6, policy="herding")
    x, y = task(0, n=36).tensors
    replay = Replay(buffer)
    model = Net()
    fit(model, replay)
    assert len(buffer) == 0
    buffer.add([x, y], features=x)
    fit(model, replay, data=loader(1))
    assert model.seen == [8, 8, 8, 8, 4, 14, 14, 14, 14, 8]
    assert len(buffer) == 6


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("first", [True, False])
def test_batches_that_tune_a_model_are_neither_kept_nor_made_longer(storage: Any, first: bool) -> None:
    sizes = []

    class Noting(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    replay, model = Replay(ReplayBuffer(100, storage=storage)), Noting()
    fpf = FPF(replay.buffer.loader(9), iterations=3)
    for seed in range(2):
        fit(model, *([fpf, replay] if first else [replay, fpf]), data=loader(seed), max_epochs=1)
    assert sizes == [8, 8, 8, 8, 4, 9, 9, 9, 16, 16, 16, 16, 8, 9, 9, 9]
    assert replay.buffer.seen == len(replay.buffer) == 72


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("made", [False, True])
def test_rows_that_are_read_again_go_through_the_hook_once(storage: Any, made: bool) -> None:
    """Those that tune, and those that a penalty learns from."""
    seen: list[Tensor] = []

    class Normalizing(Net):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 100, batch[1]]

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().forward(x)

    replay = Replay(ReplayBuffer(100, storage=storage), batch_size=0)
    rows: Any = (lambda: replay.buffer.loader(9)) if made else replay.buffer.loader(9)
    penalty = WeightPenalty(EWC(weight=1.0), loader=rows)
    fit(Normalizing(), replay, FPF(rows, iterations=5, fraction=0.1), penalty)
    assert len(seen) > 5 + 5 + 4
    assert all((x.mean() - 100).abs() < 50 for x in seen)


@pytest.mark.parametrize("boundary", [False, True])
def test_a_module_remembers_weights_as_callbacks_leave_them(boundary: bool) -> None:
    def train(model: Any, make: Any) -> Any:
        for _ in range(1 if boundary else 2):
            fit(model, *make(), *([TaskBoundary(at_epochs=[1])] if boundary else []), max_epochs=1 + boundary)
        return model

    plain, replay, penalty = Net(), Replay(ReplayBuffer(20), batch_size=0), WeightPenalty(EWC(weight=10.0))
    fpf = FPF(replay.buffer.loader(4), iterations=7, lr=0.1)
    train(plain, lambda: [replay, fpf, penalty])

    class Both(ContinualMixin, Net):
        def __init__(self) -> None:
            super().__init__()
            self.set_replay(ReplayBuffer(20))
            self.set_penalties({"ewc": EWC(weight=10.0)})

    mixed = Both()
    tuning = FPF(mixed.replay.buffer.loader(4), iterations=7, lr=0.1)
    train(mixed, lambda: [tuning])
    assert same(plain, mixed)


def test_a_tuning_on_the_buffer_that_was_cut_off_goes_on(tmp_path: Any) -> None:
    class Half(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def make() -> list[Any]:
        replay = Replay(ReplayBuffer(20))
        return [FPF(replay.buffer.loader(4), iterations=7, lr=0.1, times=2), replay]

    whole, callbacks = Net(), make()
    fit(whole, *callbacks, Half(), max_epochs=2)
    resumed = Net()
    fit(resumed, *make(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert same(whole, resumed)


def test_a_function_that_combines_draws_nothing_before_it_is_needed_and_changes_no_row() -> None:
    def combine(batch: Any, old: Any) -> Any:
        batch[0].mul_(torch.rand(()))
        return [batch[0], batch[1]]

    plain, model, replay = Net(), Net(), Replay(ReplayBuffer(99), combine=combine)
    torch.manual_seed(0)
    fit(plain)
    drawn = torch.rand(2)
    torch.manual_seed(0)
    fit(model, replay)
    assert torch.equal(torch.rand(2), drawn)
    assert same(plain, model)
    fit(model, replay, data=loader(1))
    rows = every_row(replay.buffer)
    given = torch.cat([task(seed, n=36).tensors[0] for seed in range(2)])
    assert torch.equal(rows.sort(dim=0).values, given.sort(dim=0).values)


def test_batches_that_do_not_fit_go_without_once_training_runs() -> None:
    data = [[torch.randn(4, 6), torch.zeros(4, dtype=torch.long)] for _ in range(2)]
    odd = [torch.randn(4, 6), torch.zeros(4, dtype=torch.int32)]

    class AnyLabels(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch[0], batch[1].long()], batch_idx)

    replay, model = Replay(ReplayBuffer(20)), AnyLabels()
    with pytest.warns(UserWarning, match=r"keeping a batch failed with .*`batch\[1\]` has rows .*int32.*Training goes"):
        fit(model, replay, data=[*data, odd, *data])
    assert replay.buffer.seen == 16
    with pytest.warns(UserWarning, match="rehearsing with a batch failed with .*batches like it stay as they are"):
        fit(model, replay, data=[*data, [torch.randn(4, 6), torch.zeros(4, dtype=torch.long), "odd"], *data])
    assert model.seen == [4] * 5 + [8, 8, 4, 8, 8]


class Fetching(Net):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


SHARED = Mixed()


@pytest.mark.parametrize(
    ("make", "callbacks", "data", "match"),
    [
        (Fetching, [Replay(ReplayBuffer(5))], None, r"`training_step\(dataloader_iter\)` fetches batches itself. Take"),
        (lambda: SHARED, [Replay(SHARED.replay.buffer)], None, "Two `Replay`s keep rows in one `buffer`"),
        (
            Net,
            [Replay(ReplayBuffer(5), rows=lambda b: b[:1])],
            None,
            "`batch` is a list of 2 and .* list of 1.*`combine=",
        ),
        (Net, [Replay(ReplayBuffer(5), combine=lambda b, old: old["x"])], None, r"TypeError\(.*`combine="),
        (Net, [Replay(ReplayBuffer(5))], [["a", "b"]], r"`batch\[0\]` is a str.*`rows=`"),
        (Net, [Replay(ReplayBuffer(10**12))], None, r"cannot keep the first.*take 4.8e\+04 GB.*smaller `size`"),
        (Net, [Replay(ReplayBuffer(5, policy="class_ring"))], [torch.ones(3, 2)], r"`labels` must be integers.*None"),
    ],
)
def test_misuse_is_refused_at_the_first_batch(make: Any, callbacks: Any, data: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(make(), *callbacks, data=data)


def test_arguments() -> None:
    buffer = ReplayBuffer(5)
    for arguments, match in (
        ({"buffer": 5}, "`buffer` must be a `ReplayBuffer`, got 5"),
        ({"buffer": buffer, "batch_size": -1}, "`batch_size` must be an integer of at least 0, got -1"),
        ({"buffer": buffer, "rows": 3}, "`rows` must be a function, got 3"),
        ({"buffer": buffer, "combine": None}, "`combine` must be a function, got None"),
        ({"buffer": buffer, "name": ""}, "`name` must be a string that is not empty, got ''"),
    ):
        with pytest.raises(ValueError, match=match):
            Replay(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`buffer` must be"):
        Mixed().set_replay(3)  # type: ignore[arg-type]

    class Without(ContinualMixin, Net): ...

    with pytest.raises(MisconfigurationException, match="`Without` has no replay buffer"):
        Without().replay_batch()


def test_a_teacher_that_is_copied_from_a_module_holds_no_rows() -> None:
    lwf, model = Distillation(), Mixed()
    tasks(model, lwf, count=2)
    assert lwf._teacher is not None
    assert lwf._teacher.module.replay == ()
    assert len(deepcopy(model).replay.buffer) == 10
    assert len(pickle.loads(pickle.dumps(model)).replay.buffer) == 10


def test_the_rows_of_a_loaded_module_are_back(tmp_path: Any) -> None:
    model = Mixed()
    trainer = fit(model)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = Mixed.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert torch.equal(every_row(loaded.replay.buffer), every_row(model.replay.buffer))
    assert loaded.replay.task_index == 1


def test_a_wrapper_goes_with_the_fit_that_fails() -> None:
    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    model, replay = Failing(), Replay(ReplayBuffer(50))
    with pytest.raises(RuntimeError, match="boom"):
        fit(model, replay)
    assert "on_before_batch_transfer" not in vars(model)
    assert replay.task_index == 0


def test_combined_loaders() -> None:
    """Of several streams one may be kept."""

    class Two(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["labelled"], batch_idx)

    data = {"labelled": loader(), "rest": DataLoader(TensorDataset(torch.randn(9, 2)), batch_size=3)}
    with pytest.raises(MisconfigurationException, match="as many rows as each other"):
        fit(Two(), Replay(ReplayBuffer(5)), data=data)
    replay = Replay(
        ReplayBuffer(5),
        rows=lambda batch: batch["labelled"],
        labels=lambda batch: batch["labelled"][1],
        combine=lambda batch, old: {
            **batch,
            "labelled": [torch.cat(p) for p in zip(batch["labelled"], old, strict=True)],
        },
    )
    model = Two()
    for _ in range(2):
        fit(model, replay, data=data)
    assert model.seen[-3:] == [13, 13, 8]


def test_tasks_that_are_cut_off_go_on_with_their_rows(tmp_path: Any) -> None:
    """`fit_tasks` finds the rows in the checkpoint of the last task, for callbacks that are new in every trainer."""

    def run(directory: Any, count: int) -> Any:
        model = Net()

        def trainer() -> Trainer:
            return Trainer(**{**QUIET, "logger": False, "callbacks": [Replay(ReplayBuffer(10))]})

        fit_tasks(trainer, model, [loader(index) for index in range(count)], directory=directory)
        return model

    whole = run(None, 3)
    run(tmp_path, 2)
    resumed = run(tmp_path, 3)
    assert same(whole, resumed)
    assert resumed.seen == [16, 16, 16, 16, 8]


def test_several_that_have_names_keep_rows_curves_and_states_apart(tmp_path: Any) -> None:
    """Of two streams, say; without names Lightning refuses them."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `Replay`"):
        Trainer(**QUIET, callbacks=[Replay(ReplayBuffer(9)), Replay(ReplayBuffer(9))])

    def make() -> list[Replay]:
        parts = {name: lambda batch, i=i: [part[i::2] for part in batch] for i, name in enumerate(("even", "odd"))}
        return [Replay(ReplayBuffer(9), batch_size=2, rows=rows, name=name) for name, rows in parts.items()]

    points, replays, model, others = PointKeeper(), make(), Net(), make()
    for index in range(2):
        trainer = fit(model, *replays, points, data=loader(index))
    assert model.seen[5:] == [12, 12, 12, 12, 8]
    assert {point.key for point in points.points} >= {"replay/even/rows", "replay/odd/rows"}
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    states = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    for other in others:
        other.load_state_dict(states[other.state_key])
    for replay, other in zip(replays, others, strict=True):
        assert torch.equal(every_row(replay.buffer), every_row(other.buffer))
    assert not torch.equal(*(every_row(replay.buffer) for replay in replays))


def test_a_task_of_other_rows_is_refused_at_its_first_batch() -> None:
    replay, model = Replay(ReplayBuffer(10)), Net()
    fit(model, replay)
    wider = [[torch.randn(4, 7), torch.zeros(4, dtype=torch.long)]]
    with pytest.raises(
        MisconfigurationException, match=r"`batch\[0\]` has rows of shape \(7,\).*holds of shape \(6,\)"
    ):
        fit(model, replay, data=wider)
    one = Replay(ReplayBuffer(10), combine=lambda batch, rehearsal: torch.cat([batch[0], rehearsal[1]]))
    with pytest.raises(MisconfigurationException, match=r"or add to it: .*with `combine=`"):
        fit(model, one)


def test_the_batch_that_a_fit_fails_on_is_not_kept() -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise KeyError("a label")
            return super().training_step(batch, batch_idx)

    class Saves(Callback):
        """As `OnExceptionCheckpoint` does."""

        def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
            saved.load_state_dict(replay.state_dict())

    replay, saved = Replay(ReplayBuffer(50)), Replay(ReplayBuffer(50))
    with pytest.raises(KeyError, match="a label"):
        fit(Fails(), replay, Saves())
    assert [len(of.buffer) for of in (replay, saved)] == [16, 16]


def test_rows_of_a_process_that_joins_come_after_those_that_a_ring_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(ReplayBuffer(10, policy="ring"))
    fit(Net(), replay)
    state = replay.state_dict()
    module = import_module("lightning_collapse.callbacks.continual.replay")
    monkeypatch.setattr(module, "process_rank", lambda: 1)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    joins = Replay(ReplayBuffer(10, policy="ring"))
    joins.load_state_dict(state)
    assert len(joins.buffer) == 0
    assert joins.buffer.seen == replay.buffer.seen == 36
