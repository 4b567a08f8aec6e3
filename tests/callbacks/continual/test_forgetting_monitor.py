"""How far modules move, on updates whose length is known."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_collapse import ForgettingMonitor
from lightning_collapse.callbacks.continual.forgetting_monitor import select_top
from tests.continual import Learner, training
from tests.toys import QUIET, PointKeeper, Toy, batches, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
C = 2.0**-6


class Constant(Toy):
    """Every parameter of the head moves by C a step, the last layer of the encoder by 2 C; the rest is frozen."""

    def __init__(self):
        super().__init__()
        for parameter in self.parameters():
            parameter.data = torch.round(parameter.data * 64) / 64  # sums of such numbers are exact
        self.encoder[0].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.head.parameters()) + 2 * sum(p.sum() for p in self.encoder[2].parameters())

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=C)


def learn(model, callbacks, fits=1, loader=None, **kwargs):
    for _ in range(fits):
        trainer = Trainer(**{**QUIET, "logger": False, "callbacks": list(callbacks), **kwargs})
        trainer.fit(model, loader if loader is not None else batches())
    return trainer


def test_constant_updates_frozen_modules_and_tasks():
    monitor, keeper = ForgettingMonitor(), PointKeeper()
    learn(Constant(), [monitor, keeper], fits=2, max_epochs=3)
    for layer, size in (("head", 1), ("encoder.2", 2), ("encoder.0", 0)):
        epochs, tasks = (keeper.curve(f"continual/{layer}/{kind}") for kind in ("epoch_change", "task_change"))
        assert [point.value for point in epochs] == [6 * C * size] * 6
        assert [point.value for point in tasks] == [18 * C * size] * 2
        assert [point.step for point in epochs] == [6, 12, 18, 24, 30, 36]
        assert [point.step for point in tasks] == [18, 36]
    assert monitor.select_top(0.5) == ["encoder.2", "head"]
    assert monitor.select_top(0.1, of="epoch_change") == ["encoder.2"]


def test_buffers_are_a_layer_of_their_own():
    model, keeper = Learner(), PointKeeper()
    before = weights(model)
    learn(model, [ForgettingMonitor(), keeper], loader=training(1))
    after = weights(model)

    def moved(*names):
        change = torch.cat([(after[name] - before[name]).abs().flatten() for name in names])
        return pytest.approx(change.mean().item(), rel=1e-5)

    values = {point.key.removeprefix("continual/"): point.value for point in keeper.points}
    assert values["body.1.buffers/task_change"] == moved("body.1.running_mean", "body.1.running_var")
    assert values["body.1/epoch_change"] == moved("body.1.weight", "body.1.bias")
    assert values["head/task_change"] == moved("head.weight", "head.bias")
    assert len(values) == 2 * 4


def test_layers_by_pattern():
    keeper = PointKeeper()
    learn(Constant(), [ForgettingMonitor(layers=["encoder"], between_tasks=False), keeper])
    [point] = keeper.points
    size = sum(p.numel() for p in nn.Linear(32, 8).parameters())
    assert point.key == "continual/encoder/epoch_change"
    assert point.value == pytest.approx(12 * C * size / (size + 16 * 32 + 32))


def test_training_does_not_notice():
    def run(*callbacks):
        torch.manual_seed(0)
        model = Learner()
        learn(model, callbacks, fits=2, loader=training(1))
        return weights(model), torch.rand(2)

    (one, drawn), (other, again) = run(), run(ForgettingMonitor())
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 4}])
def test_a_resumed_run_draws_the_same(tmp_path, every):
    """From the end of an epoch, and from the midst of one."""

    def run(**kwargs):
        keeper = PointKeeper()
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **every)
        options = {**QUIET, "logger": False, "max_epochs": 3, "enable_checkpointing": True}
        trainer = Trainer(**options, callbacks=[monitor, keeper, saver])
        trainer.fit(Constant(), batches(), **kwargs)  # Lightning does not take a loader up where it was
        return {(point.key, point.step): point.value for point in keeper.points}

    monitor = ForgettingMonitor()
    whole = run()
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))[1]
    assert ("of_epoch" in torch.load(saved, weights_only=True)["callbacks"][monitor.state_key]) == (
        "every_n_train_steps" in every
    )
    monitor = ForgettingMonitor()
    rest = run(ckpt_path=saved)
    assert len(rest) >= 6
    assert all(whole[key] == value for key, value in rest.items())


def test_a_head_that_grows_is_compared_where_it_can_be():
    model, monitor, keeper = Constant(), ForgettingMonitor(), PointKeeper()
    learn(model, [monitor, keeper])
    model.head = nn.Linear(8, 3)
    learn(model, [monitor, keeper])
    assert keeper.curve("continual/head/task_change")[-1].value == pytest.approx(6 * C, rel=1e-5)


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="`layers` takes a list"):
        ForgettingMonitor(layers="head")
    with pytest.raises(MisconfigurationException, match="'nothing' matches no submodule"):
        learn(Constant(), [ForgettingMonitor(layers=["nothing"])])
    with pytest.raises(ValueError, match="`fraction`"):
        select_top({"a": 1.0}, 0.0)
    assert select_top({"a": 1.0, "b": 2.0, "c": 3.0}, 1.0) == ["c", "b", "a"]


def test_layers_of_any_name_have_curves_of_their_own():
    class Named(Learner):
        def __init__(self):
            super().__init__()
            self.accuracy, self.猫, self.犬 = (nn.Linear(2, 2) for _ in range(3))

    monitor, keeper = ForgettingMonitor(), PointKeeper()
    learn(Named(), [monitor, keeper], loader=training(1))
    keys = {point.key for point in keeper.points}
    assert {"猫", "犬", "accuracy.module"} < set(monitor.changes["task_change"])
    assert len(keys) == 2 * len(monitor.changes["task_change"])
    assert not any(key.startswith("continual/accuracy/") for key in keys)
