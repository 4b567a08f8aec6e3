"""Networks that forget, or can no longer learn, on planted curves and on planted failures."""

from math import nan

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseGuard, ContinualMetrics, PlasticityMonitor, fit_tasks
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from tests.toys import QUIET, Claims, PointKeeper, Toy, batches, fit


class Planted(Callback):
    """One curve, one point per step."""

    def __init__(self, key, values, n, null):
        self.key, self.values, self.n, self.null = key, values, n, null

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        value = self.values[batch_idx]
        publish(trainer, pl_module, [Point(*self.key, batch_idx, value, self.n, self.null)])


class Harmed(Toy):
    """Whose loss rises from the fourth step on."""

    def training_step(self, batch, batch_idx):
        return (1.0 + 10.0 * (batch_idx >= 3)) * super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def judged(values, key, n=500, null=nan, model=Harmed):
    guard, keeper = CollapseGuard(action="log"), PointKeeper()
    monitor = Claims(key[0])
    fit(model(), [monitor, guard, Planted(key, values, n, null), keeper], batches(len(values)), log_every_n_steps=1)
    return guard, keeper


UNITS, TASK = ("plasticity", "encoder.1", "dormant_fraction"), ("continual", "task0", "accuracy")


def test_half_of_the_active_units_gone():
    guard, keeper = judged([0.2] * 4 + [0.7] * 3 + [0.5] * 3 + [0.3] * 2, UNITS)
    [verdict] = guard.verdicts
    assert (verdict.kind, verdict.layer, verdict.since, verdict.step) == ("plasticity_loss", "encoder.1", 4, 5)
    assert verdict.evidence == "over 500 rows 70 % of the units are dormant, where the run began with 20 %"
    assert verdict.advice.startswith("Bring units back with `ShrinkAndPerturb()`")
    assert [point.value for point in keeper.curve("guard/plasticity_loss")] == [0] * 5 + [1] * 6 + [0]


def test_units_fall_silent_in_networks_that_learn():
    class Learns(Toy):
        def training_step(self, batch, batch_idx):
            return 0.8**batch_idx + 0 * super().training_step(batch, batch_idx)

    guard, _ = judged([0.2] * 4 + [0.7] * 8, UNITS, model=Learns)
    assert (guard.verdicts, [notice.since for notice in guard.notices]) == ([], [4])


@pytest.mark.parametrize("values", [[0.8] * 8, [0.8] * 4 + [0.85] * 4, [0.2] * 4 + [0.55] * 4, [0.0, 0.9] * 4])
def test_what_only_looks_like_a_loss_of_plasticity(values):
    assert judged(values, UNITS)[0].verdicts == []


def test_half_of_what_was_learned_forgotten_is_said_at_once():
    guard, keeper = judged([0.5, 0.9, 0.95, 0.6, 0.9], TASK, null=0.5)
    [verdict] = guard.verdicts
    assert (verdict.kind, verdict.layer, verdict.since, verdict.step) == ("catastrophic_forgetting", "task0", 3, 3)
    assert verdict.evidence == (
        "over 500 samples the accuracy on this task is 0.60, where its best was 0.95, and the untrained network's 0.50"
    )
    assert [point.value for point in keeper.curve("guard/catastrophic_forgetting")] == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ([0.95, 0.7], {}),  # forgetting, but most is still known
        ([0.15, 0.08, 0.05], {"null": 0.1}),  # not learned yet
        ([0.7, 0.3], {"null": 0.5}),
        ([1.0, 0.4], {"n": 3}),  # chance
        ([8.0, 1.0], {}),  # no accuracy
    ],
    ids=["little", "not learned", "binary", "chance", "score"],
)
def test_what_only_looks_like_forgetting(values, facts):
    assert judged(values, TASK, **facts)[0].verdicts == []


def test_the_mean_over_tasks_is_no_task():
    assert judged([0.95, 0.1], ("continual", "", "accuracy"))[0].verdicts == []


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def task(classes):
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(4, 8, generator=generator)
    y = torch.tensor(classes).repeat(128)
    x = centers[y] + 0.5 * torch.randn(len(y), 8, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=32)


@pytest.mark.parametrize(("second", "forgets"), [([2, 3], True), ([0, 1], False)])
def test_one_guard_goes_through_all_tasks(second, forgets):
    loaders = [task([0, 1]), task(second)]
    guard, metrics = CollapseGuard(action="log"), ContinualMetrics(loaders)
    options = {**QUIET, "max_epochs": 6, "logger": False}
    fit_tasks(lambda **kwargs: Trainer(**options, callbacks=[metrics, guard], **kwargs), Classifier(), loaders)
    assert [(verdict.kind, verdict.layer) for verdict in guard.verdicts] == (
        [("catastrophic_forgetting", "task0")] if forgets else []
    )


def test_units_that_die_in_training():
    class Dying(Harmed):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx >= 6:
                self.encoder[0].bias.data[:24] = -100.0

    guard = CollapseGuard(action="log")
    fit(Dying(), [PlasticityMonitor(every_n_steps=1, batches=1), guard], batches(10))
    assert [(verdict.kind, verdict.layer, verdict.since) for verdict in guard.verdicts] == [
        ("plasticity_loss", "encoder.1", 6)
    ]
