"""Adapters on a frozen base: what is kept is as large as the adapters, and what is computed is the same."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import Distillation, WeightPenalty
from lightning_collapse.penalties import EWC, MAS, L2Init, RWalk, SynapticIntelligence
from lightning_collapse.utilities.copies import fill, tensors_of
from tests.toys import QUIET, PointKeeper, weights

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
WIDTH = 32


class LoRA(nn.Module):
    """A frozen linear layer, and a product of two thin ones beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Adapted(LightningModule):
    """Its base is frozen, in part a running average of the adapters where it is asked for."""

    def __init__(self, averages=False, thaws=False):
        super().__init__()
        self.averages, self.thaws = averages, thaws
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = LoRA(nn.Linear(WIDTH, WIDTH)), LoRA(nn.Linear(WIDTH, 3))

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))

    def on_train_epoch_start(self):
        if self.thaws:
            self.head.base.requires_grad_(True)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.averages:
            self.head.base.weight.data.mul_(0.9).add_(self.head.up.weight @ self.head.down.weight, alpha=0.1)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)  # of all: frozen ones have no gradient


def data(task):
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(24, WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(3, (24,), generator=generator)), batch_size=8)


def learn(model, *callbacks, tasks=(0,), **kwargs):
    for task in tasks:
        trainer = Trainer(**{**QUIET, "logger": False, "max_epochs": 1, **kwargs}, callbacks=list(callbacks))
        trainer.fit(model, data(task))
    return trainer


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("penalty", [EWC, MAS, L2Init, RWalk, SynapticIntelligence])
def test_penalties_remember_what_is_trained(penalty):
    callback, model = WeightPenalty(penalty(0.01)), Adapted()
    learn(model, callback)
    assert not callback.containment.failed
    assert {name for table in callback.penalty.state.tables.values() for name in table} == trainable(model)


@pytest.mark.parametrize("penalty", [L2Init, RWalk, SynapticIntelligence])
def test_what_thaws_within_a_fit_is_remembered_from_where_it_stood(penalty):
    callback, model = WeightPenalty(penalty(0.01)), Adapted(thaws=True)
    stood = model.head.base.weight.detach().clone()
    learn(model, callback)
    assert not callback.containment.failed
    state = callback.penalty.state
    assert "body.base.weight" not in state["anchor"]
    if penalty is L2Init:
        assert torch.equal(state["anchor"]["head.base.weight"], stood)
        assert not torch.equal(model.head.base.weight, stood)
    else:
        assert state["importance"]["head.base.weight"].abs().max() > 0


def test_a_teacher_has_the_frozen_base_of_the_student():
    lwf, model = Distillation(), Adapted()
    learn(model, lwf)
    state = lwf.state_dict()
    assert {*state["teacher"]} == trainable(model)
    teacher = lwf._teacher.module
    assert teacher.head.base.weight is model.head.base.weight
    assert teacher.head.up.weight is not model.head.up.weight
    # computes what a copy of all of it does
    whole, copied = Adapted(), Distillation()
    learn(whole, copied)
    copied._teacher.shared.clear()
    fill(copied._teacher.module, tensors_of(copied._teacher.module))
    for student, callback in ((model, lwf), (whole, copied)):
        learn(student, callback, tasks=(1,))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(model).items())


def test_a_resumed_teacher_is_the_same_and_another_base_is_noticed(tmp_path):
    lwf, model = Distillation(), Adapted()
    learn(model, lwf).save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    resumed, again = Adapted(), Distillation()
    resumed.load_state_dict(checkpoint["state_dict"])
    again.load_state_dict(checkpoint["callbacks"][lwf.state_key])
    for student, callback in ((model, lwf), (resumed, again)):
        learn(student, callback, tasks=(1,))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(model).items())
    other, third = Adapted(), Distillation()
    with torch.no_grad():
        other.head.base.weight += 1
    third.load_state_dict(checkpoint["callbacks"][lwf.state_key])
    with pytest.warns(UserWarning, match=r"`Distillation`: head.base.weight and 0 others are frozen"):
        learn(other, third, tasks=(1,))


def test_what_changes_though_it_is_frozen_is_copied():
    """A running average of trained weights, written past the version counter."""
    lwf, model = Distillation(), Adapted(averages=True)
    learn(model, lwf)
    assert "head.base.weight" in lwf.state_dict()["teacher"]
    assert "body.base.weight" not in lwf.state_dict()["teacher"]
    before = lwf._teacher.module.head.base.weight.clone()
    learn(model, lwf, tasks=(1,), limit_train_batches=1)
    assert not torch.equal(model.head.base.weight, before)


def test_what_is_thawed_later_is_copied_before_it_moves():
    lwf, model = Distillation(), Adapted()
    learn(model, lwf)
    teacher, stood = lwf._teacher, model.head.base.weight.detach().clone()
    model.thaws = True
    lwf.end_task = lambda *_: None
    learn(model, lwf, tasks=(1,))
    assert torch.equal(teacher.module.head.base.weight, stood)
    assert not torch.equal(model.head.base.weight, stood)
    assert teacher.module.body.base.weight is model.body.base.weight


def test_rank_one_shares_are_curves_of_modules():
    keeper, model = PointKeeper(), Adapted()
    learn(model, WeightPenalty(EWC(0.01, estimator="empirical")), keeper, tasks=(0, 1))
    keys = {point.key for point in keeper.points if point.measure == "rank_one_share"}
    assert keys == {f"continual/{m}/rank_one_share" for m in ("all", "body.down", "body.up", "head.down", "head.up")}
    assert len(keeper.curve("continual/all/rank_one_share")) == 2
    assert all(point.value <= 1 for point in keeper.points if point.measure == "rank_one_share")
