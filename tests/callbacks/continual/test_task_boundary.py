"""Tasks that end inside one fit, on their own data."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_collapse import ContinualMetrics, TaskBoundary
from tests.continual import Counting, Learner, accuracy, held_out, task, training
from tests.toys import QUIET

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
FIRST = [float(task(seed)[0][0].sum()) for seed in (1, 2, 3)]


class Stream(LightningDataModule):
    """Three tasks, one after the other."""

    def __init__(self):
        super().__init__()
        self.task_index = 0

    def train_dataloader(self):
        return training(1 + self.task_index)


def fit(boundary, *callbacks, model=None, data=None, ckpt_path=None, **kwargs):
    options = {**QUIET, "logger": False, "max_epochs": 6, "reload_dataloaders_every_n_epochs": 1, **kwargs}
    trainer = Trainer(**options, callbacks=[boundary, *callbacks])
    trainer.fit(model or Learner(), data if data is not None else Stream(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    "choice", [{"every_n_epochs": 2}, {"at_epochs": [2, 4]}, {"when": lambda trainer: trainer.current_epoch in (1, 3)}]
)
def test_tasks_end_on_their_own_data(choice):
    counting, boundary = Counting(), TaskBoundary(**choice)
    fit(boundary, counting)
    assert counting.ends == [[12, FIRST[0]], [24, FIRST[1]], [36, FIRST[2]]]
    assert counting.task_index == 3


class ByHand(Callback):
    """Accuracies at the end of every epoch."""

    def __init__(self):
        self.rows = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.rows.append([accuracy(pl_module, seed) for seed in (1, 2, 3)])


def test_every_task_is_measured_where_it_ends():
    metrics, by_hand = ContinualMetrics([held_out(seed) for seed in (1, 2, 3)]), ByHand()
    fit(TaskBoundary(every_n_epochs=2), metrics, by_hand)
    assert torch.allclose(metrics.values, torch.tensor(by_hand.rows[1::2]))
    assert not torch.equal(metrics.values[0], metrics.values[1])


class Told(Learner):
    """A module that wants to know."""

    def __init__(self):
        super().__init__()
        self.told = []

    def finish_task(self, trainer, pl_module):
        assert pl_module is self
        self.told.append(trainer.current_epoch)


def test_module_is_told_too():
    model = Told()
    fit(TaskBoundary(every_n_epochs=2), model=model)
    assert model.told == [1, 3, 5]


def test_checkpoint_of_the_epoch_holds_the_end_and_a_resumed_run_goes_on(tmp_path):
    def saver():
        return ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")

    counting, boundary = Counting(), TaskBoundary(every_n_epochs=2)
    fit(boundary, counting, saver(), enable_checkpointing=True)
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert state[counting.state_key]["task"] == 1
    again, data = Counting(), Stream()
    resumed = {"enable_checkpointing": True, "ckpt_path": tmp_path / "epoch=3.ckpt"}
    fit(TaskBoundary(every_n_epochs=2), again, saver(), data=data, **resumed)
    assert again.ends == counting.ends
    assert data.task_index == 3


def test_dry_run_ends_no_task():
    counting = Counting()
    fit(TaskBoundary(every_n_epochs=1), counting, fast_dev_run=True)
    assert counting.task_index == 0


def test_data_that_would_stay_the_same_are_refused():
    with pytest.raises(MisconfigurationException, match="`reload_dataloaders_every_n_epochs=0`"):
        fit(TaskBoundary(every_n_epochs=2), reload_dataloaders_every_n_epochs=0)
    counting = Counting()
    fit(TaskBoundary(every_n_epochs=3), counting, data=training(1), reload_dataloaders_every_n_epochs=0)
    assert counting.task_index == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "got none"),
        ({"every_n_epochs": 2, "at_epochs": [3]}, "`every_n_epochs` and `at_epochs`"),
        ({"every_n_epochs": 0}, "at least 1, got 0"),
        ({"at_epochs": []}, "`at_epochs` takes"),
        ({"at_epochs": [0]}, "`at_epochs` takes"),
        ({"when": 3}, "`when` takes a function"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TaskBoundary(**kwargs)
