"""A resumed fit goes on, a fresh one begins anew, and a tuner's trial is neither."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.trainer import is_resumed
from tests.toys import HEALTHY, QUIET, Claims, Toy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*"),  # of the tuners
]


class Tunable(Toy):
    """With the attributes that tuners set, and a loader of its own."""

    def __init__(self, size=8):
        super().__init__()
        self.lr, self.batch_size = 0.01, size

    def train_dataloader(self):
        return DataLoader(torch.randn(64, 16), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Planted(Callback):
    """One reading of the feature std per step."""

    def __init__(self, std):
        self.std = std

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        values = {**HEALTHY, "feature_std": self.std(trainer.global_step - 1)}
        points = [Point("collapse", "z", m, batch_idx, v, 64, 60.0) for m, v in values.items()]
        publish(trainer, pl_module, points)


class Ask(Callback):
    """Whether a fit is a resumed one."""

    def __init__(self):
        self.answers = []

    def on_fit_start(self, trainer, pl_module):
        self.answers.append(is_resumed(trainer))


def baseline_of(guard):
    [entry] = [
        e for e in guard.state_dict()["judge"]["baselines"] if (e["kind"], e["layer"]) == ("complete_collapse", "z")
    ]
    return entry["curves"]["feature_std"]["value"]


def train(guard, std, *callbacks, path=None, **kwargs):
    monitor = Claims()
    settings = {**QUIET, "logger": False, "callbacks": [monitor, guard, *callbacks, Planted(std)], **kwargs}
    trainer = Trainer(**settings)
    trainer.fit(Tunable(), ckpt_path=path)
    return trainer


TUNERS = {
    "learning rate": lambda: LearningRateFinder(num_training_steps=3),
    "batch size": lambda: BatchSizeFinder(max_trials=1, steps_per_trial=1),
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_second_fit_behind_a_tuner_has_its_own_baseline(tuner, tmp_path):
    guard, ask = CollapseGuard(action="log"), Ask()
    for std in (5.0, 1.0):
        train(guard, lambda step, std=std: std, TUNERS[tuner](), ask, default_root_dir=tmp_path)
        assert baseline_of(guard) == std
    assert ask.answers == [False, False]
    train(guard, lambda step: 1.0 if step < 4 else 1e-4, TUNERS[tuner](), default_root_dir=tmp_path)
    assert [(verdict.since, verdict.step) for verdict in guard.verdicts] == [(4, 5)]


def test_a_resumed_fit_keeps_its_baseline(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="half")
    train(CollapseGuard(action="log"), lambda step: 5.0, save, enable_checkpointing=True)
    guard, ask = CollapseGuard(action="log"), Ask()
    train(guard, lambda step: 1.0, ask, path=tmp_path / "half.ckpt", max_epochs=2)
    assert baseline_of(guard) == 5.0
    assert ask.answers == [True]


def test_a_state_that_the_user_has_loaded_is_kept_once():
    before, guard = CollapseGuard(action="log"), CollapseGuard(action="log")
    train(before, lambda step: 5.0)
    guard.load_state_dict(before.state_dict())
    train(guard, lambda step: 1.0)
    assert baseline_of(guard) == 5.0
    train(guard, lambda step: 1.0)
    assert baseline_of(guard) == 1.0
