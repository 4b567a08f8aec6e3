"""Tasks that end where a curve jumps: at once, the same on every process and in a resumed run."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CurveJump, TaskBoundary, WeightPenalty
from lightning_collapse.penalties import EWC, SynapticIntelligence
from lightning_collapse.rules import Burst
from tests.continual import Counting
from tests.toys import QUIET, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
N, CHANGE = 60, 40  # batches of four


class Regressor(LightningModule):
    """Its targets change their sign at one batch, and nobody says so."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(3, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Stream:
    """Batches in order, that know where they are."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(N, 4, 3, generator=generator)
        y = 5 * x.sum(dim=2, keepdim=True) + 0.1 * torch.randn(N, 4, 1, generator=generator)
        y[CHANGE:] *= -1
        self.batches, self.at, self.dataset = list(zip(x, y, strict=True)), 0, [(x[0], 0)]

    def __len__(self):
        return N

    def __iter__(self):
        while self.at < N:
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state_dict):
        self.at = state_dict["at"]


def fit(boundary, *callbacks, ckpt_path=None, **kwargs):
    model, options = Regressor(), {**QUIET, "logger": False, "max_epochs": 1, **kwargs}
    Trainer(**options, callbacks=[boundary, *callbacks]).fit(model, Stream(), ckpt_path=ckpt_path)
    return model


def test_a_task_ends_right_behind_the_change():
    counting, boundary = Counting(), TaskBoundary(when=CurveJump("train_loss", Burst(planned=N)), every_n_steps=1)
    fit(boundary, counting)
    steps = [step for step, _ in counting.ends]
    assert steps == [CHANGE + 1, N]  # one batch of the new data is in it, and the last task ends with the fit
    assert boundary.task_index == 1


def test_a_score_counts_where_it_rises():
    scores = [0.2, 1.5, 2.0, 0.1, 1.0, 1.0]
    jump = CurveJump("score", detector=None)
    found = []
    for value in scores:
        fake = _Trainer({"score": torch.tensor(value)})
        found.append(jump(fake))
    assert found == [False, True, False, False, True, False]
    fake = _Trainer({"score": torch.tensor(0.0)})
    assert [jump(fake), jump(fake)] == [False, False]


class _Trainer:
    """What a jump reads of a trainer."""

    def __init__(self, metrics):
        real = Trainer(**QUIET, logger=False)
        self.callback_metrics, self.strategy, self.fit_loop = metrics, real.strategy, real.fit_loop


def test_gaps_and_repeated_values_are_no_points():
    jump, burst = CurveJump("loss"), Burst()
    numbers = [1.0 + 0.01 * (step * 7 % 5) for step in range(30)]
    for step, number in enumerate(numbers):
        value = _Trainer({"loss": torch.tensor(number)})
        assert not jump(value)
        assert not jump(value)  # not published since
        assert not jump(_Trainer({"loss": torch.tensor(torch.nan)}))
        burst.update(step, number)
    found, expected = jump.state_dict()["detector"], burst.state_dict()
    assert found["differences"] == pytest.approx(expected["differences"], abs=1e-6)
    assert jump(_Trainer({"loss": torch.tensor(9.0)}))
    assert jump.state_dict()["detector"] == Burst().state_dict()  # begins anew


def test_a_resumed_run_decides_the_same(tmp_path):
    """From a checkpoint at the very step whose point jumps, and from one before."""

    def callbacks():
        saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        boundary = TaskBoundary(when=CurveJump("train_loss", Burst(planned=N)), every_n_steps=1)
        return boundary, Counting(), WeightPenalty(SynapticIntelligence(0.001), name="si"), saver

    boundary, counting, *others = callbacks()
    whole = weights(fit(boundary, counting, *others, enable_checkpointing=True))
    for step in (CHANGE + 1, 30):
        boundary, again, *others = callbacks()
        path = tmp_path / f"step={step}.ckpt"
        torch.load(path, weights_only=True)
        resumed = fit(boundary, again, *others, enable_checkpointing=True, ckpt_path=path)
        assert again.ends == counting.ends
        assert all(torch.equal(value, whole[name]) for name, value in weights(resumed).items())


def test_workers_of_a_running_epoch_are_not_taken():
    """By a penalty that reads the training data; others do not mind."""
    loader = DataLoader(TensorDataset(torch.randn(8, 3), torch.randn(8, 1)), num_workers=1, persistent_workers=True)
    boundary = TaskBoundary(when=CurveJump("train_loss"), every_n_steps=1)
    trainer = Trainer(**{**QUIET, "logger": False}, callbacks=[boundary, WeightPenalty(EWC(likelihood="gaussian"))])
    with pytest.raises(MisconfigurationException, match=r"`persistent_workers=False`, or `WeightPenalty\(..., loader="):
        trainer.fit(Regressor(), loader)


def test_what_is_wrong_is_said():
    with pytest.warns(UserWarning, match=r"`CurveJump\('loss'\)`: there is no such curve yet.*train_loss"):
        fit(TaskBoundary(when=CurveJump("loss"), every_n_steps=20))
    for kwargs, message in (({"curve": 3}, "name of a curve"), ({"curve": "a", "detector": 3}, "`detector` takes")):
        with pytest.raises(ValueError, match=message):
            CurveJump(**kwargs)
    with pytest.raises(ValueError, match="given without it"):
        TaskBoundary(every_n_epochs=1, every_n_steps=3)
