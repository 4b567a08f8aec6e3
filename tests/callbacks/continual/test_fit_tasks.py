"""A sequence of tasks that is cut off anywhere and taken up again is the sequence that was not."""

import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_collapse import ContinualMetrics, PlasticityMonitor, fit_tasks
from lightning_collapse.utilities.random_states import random_states, restore_random_states
from tests.continual import Counting, Learner, held_out, training
from tests.toys import QUIET, MemoryLogger, PointKeeper, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
TASKS = (1, 2, 3)


class CutOffError(Exception):
    """Power failure."""


class Cut(Callback):
    """Ends a run with an exception at a hook, when so many batches were trained in all."""

    def __init__(self, hook, batches):
        self.left = batches
        setattr(self, hook, self._fail)
        self.hook = hook

    def on_train_batch_end(self, *args):
        self.left -= 1

    def _fail(self, *args, **kwargs):
        if self.left <= 0:
            raise CutOffError


def sequence(directory, *callbacks, shared=True, epochs=3):
    """Tasks in a fresh process, as it were: new module, new callbacks; returns all there is to compare."""
    model, keeper = Learner(), PointKeeper()

    def make():
        return ContinualMetrics([held_out(seed) for seed in TASKS], every_n_steps=4), Counting()

    first = make()
    mine = []

    def make_trainer(index):
        mine[:] = first if shared else make()
        saver = ModelCheckpoint(directory, save_last=True, every_n_epochs=1)
        options = {**QUIET, "enable_checkpointing": True, "max_epochs": epochs, "logger": MemoryLogger()}
        return Trainer(**options, callbacks=[*mine, *callbacks, keeper, saver])

    fit_tasks(make_trainer, model, [training(seed) for seed in TASKS], directory=directory)
    metrics, counting = mine
    return weights(model), metrics.values, counting.ends, counting.task_index, torch.rand(4), keeper


def same(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert torch.equal(one[1], other[1])
    assert one[2:4] == other[2:4]
    assert torch.equal(one[4], other[4])


@pytest.fixture
def whole(tmp_path):
    torch.manual_seed(5)
    return sequence(tmp_path / "whole")


# six batches an epoch, three epochs a task
@pytest.mark.parametrize(
    ("hook", "batches"),
    [
        ("on_train_epoch_start", 6),
        ("on_train_epoch_start", 12),
        ("on_train_end", 18),  # the last epoch is saved, the end of the task is not
        ("setup", 18),
        ("on_train_epoch_start", 30),
        ("setup", 36),
    ],
)
def test_cut_off_and_taken_up_again(whole, tmp_path, hook, batches):
    torch.manual_seed(5)
    with pytest.raises(CutOffError):
        sequence(tmp_path / "cut", Cut(hook, batches))
    torch.manual_seed(99)  # another process
    random.seed(99)
    np.random.seed(99)
    same(sequence(tmp_path / "cut"), whole)


def test_without_an_epoch_saved_the_task_starts_anew(whole, tmp_path):
    torch.manual_seed(5)
    with pytest.raises(CutOffError):
        sequence(tmp_path / "cut", Cut("on_before_backward", 20))  # in the first epoch of the second task
    same(sequence(tmp_path / "cut"), whole)


def test_all_done_is_only_read(whole, tmp_path):
    torch.manual_seed(99)
    again = sequence(tmp_path / "whole")
    same(again, whole)
    assert not again[5].points
    assert sorted(path.name for path in (tmp_path / "whole").glob("task*")) == [
        "task0.ckpt",
        "task1.ckpt",
        "task2.ckpt",
    ]


def test_new_callbacks_take_over_from_old_ones(whole, tmp_path):
    torch.manual_seed(5)
    apart = sequence(tmp_path / "apart", shared=False)
    same(apart, whole)
    assert repr(apart[5].points) == repr(whole[5].points)


def test_checkpoint_is_of_after_the_end_of_the_task(tmp_path):
    counting = Counting()

    def make_trainer():
        saver = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
        return Trainer(**{**QUIET, "enable_checkpointing": True}, logger=False, callbacks=[counting, saver])

    trainer = fit_tasks(make_trainer, Learner(), [training(1), (training(2), None)], directory=tmp_path)
    for name, task in (("task0", 1), ("last", 0), ("task1", 2), ("last-v1", 1)):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"]
        assert saved[counting.state_key]["task"] == task
    assert trainer.callbacks[0] is counting
    assert len(counting.ends) == 2


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, counting = Learner(), Counting()
    fit_tasks(lambda: Trainer(**QUIET, logger=False, callbacks=[counting]), model, [training(1), training(2)])
    assert not list(tmp_path.iterdir())
    assert counting.task_index == 2


class OfModule(Learner):
    """A module that makes its callbacks anew for every trainer."""

    def configure_callbacks(self):
        self.made = Counting()
        return [self.made]


def test_callbacks_of_the_module_take_over_too():
    model = OfModule()
    fit_tasks(lambda: Trainer(**QUIET, logger=False), model, [training(1), training(2), training(3)])
    assert model.made.task_index == 3
    assert len(model.made.ends) == 3


class Digits(LightningDataModule):
    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def train_dataloader(self):
        return training(self.seed)


def test_data_modules_are_the_same_as_loaders():
    found = []
    for tasks in ([training(1), training(2)], [Digits(1), Digits(2)]):
        torch.manual_seed(3)
        model = Learner()
        fit_tasks(lambda: Trainer(**QUIET, logger=False), model, tasks)
        found.append(weights(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_cannot_be_is_said():
    trainer = Trainer(**QUIET, logger=False)
    with pytest.raises(MisconfigurationException, match="same `Trainer` twice"):
        fit_tasks(lambda: trainer, Learner(), [training(1), training(2)])
    with pytest.raises(MisconfigurationException, match="must return a `Trainer`"):
        fit_tasks(lambda index: index, Learner(), [training(1)])
    with pytest.raises(ValueError, match="`tasks` is empty"):
        fit_tasks(lambda: trainer, Learner(), [])
    with pytest.raises(MisconfigurationException, match="spawns processes"):
        fit_tasks(lambda: Trainer(**QUIET, logger=False, strategy="ddp_spawn"), Learner(), [training(1)])

    trainers = [Trainer(**QUIET, logger=False, callbacks=[Counting()]), Trainer(**QUIET, logger=False)]
    with pytest.warns(UserWarning, match="takes the state of Counting over"):
        fit_tasks(lambda index: trainers[index], Learner(), [training(1), training(2)])


def test_random_states_go_through_a_file(tmp_path):
    torch.save(random_states(), tmp_path / "states.pt")
    drawn = random.random(), float(np.random.rand()), torch.rand(1).item()
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (random.random(), float(np.random.rand()), torch.rand(1).item()) == drawn


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_distances_are_from_the_start_of_the_first_task(tmp_path, shared, cut):
    def begin(tasks):
        monitors = [PlasticityMonitor(every_n_steps=3, batches=1) for _ in TASKS]
        return fit_tasks(
            lambda index: Trainer(**QUIET, logger=False, callbacks=[monitors[0 if shared else index]]),
            Learner(),
            [training(seed) for seed in TASKS[:tasks]],
            directory=tmp_path,
        )

    if cut:
        begin(2)
    trainer = begin(3)
    pairs = zip(trainer.lightning_module.parameters(), Learner().parameters(), strict=True)
    distance = torch.cat([(now - start).flatten() for now, start in pairs]).norm().item()
    assert trainer.callback_metrics["plasticity/all/init_distance"].item() == pytest.approx(distance, rel=1e-5)


def test_a_trainer_is_no_function_that_makes_one():
    with pytest.raises(ValueError, match="`make_trainer` takes a function"):
        fit_tasks(Trainer(**QUIET, logger=False), Learner(), [training(1)])
