"""What a rollback keeps is what is trained, and it comes back whole or not at all."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch.optim.lr_scheduler import LambdaLR, StepLR

from lightning_collapse import CollapseGuard, Regularizer, Rollback
from lightning_collapse.losses import CorInfoMax
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY, Claims, Toy, batches, fit

BAD = {**HEALTHY, "feature_std": 1e-4}
SCRIPT = [HEALTHY] * 5 + [BAD] * 2 + [HEALTHY]


class Net(Toy):
    """With momentum and a scheduler per step."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([*self.encoder.parameters(), *self.head.parameters()], lr=0.01)
        return [optimizer], [{"scheduler": StepLR(optimizer, 3, 0.7), "interval": "step"}]


class Unscheduled(Net):
    """Without one."""

    def configure_optimizers(self):
        return super().configure_optimizers()[0]


class Script(Callback):
    """Planted readings, and what ``look`` sees before and after each of them."""

    def __init__(self, look):
        self.look, self.before, self.after = look, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.before.append(copy.deepcopy(self.look(trainer)))
        step = trainer.global_step - 1
        publish(trainer, pl_module, [Point("collapse", "z", m, step, v, 64, 60.0) for m, v in SCRIPT[step].items()])
        self.after.append(copy.deepcopy(self.look(trainer)))


def tensors(trainer):
    return trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict()["state"]


def run(tmp_path, look, model=None, first=(), last=(), **kwargs):
    torch.manual_seed(0)
    script = Script(look)
    guard = CollapseGuard(action=["log", Rollback(1.0, 1, margin=1)], dirpath=str(tmp_path), task="self-supervised")
    monitor = Claims()
    loader = batches(kwargs.pop("n", len(SCRIPT)))
    trainer = fit(model or Net(), [*first, monitor, guard, script, *last], loader, **kwargs)
    return script, trainer


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return all(map(equal, one, other)) if isinstance(one, list | tuple) else one == other


RETURNS = r"`Rollback` at step 6: .* those of step 4 again"


def test_raw_weights_and_the_average_come_back(tmp_path):
    average = EMAWeightAveraging(decay=0.9)
    with pytest.warns(UserWarning, match=RETURNS):
        script, _ = run(tmp_path, lambda t: (tensors(t), average._average_model.state_dict()), last=[average])
    assert equal(script.after[6], script.before[4])
    assert not equal(script.before[6][1], script.before[4][1])
    assert not equal(script.before[4][0][0]["head.weight"], script.before[4][1]["module.head.weight"])


def test_an_average_that_began_with_the_epochs_comes_back(tmp_path):
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)

    def look(trainer):
        return tensors(trainer), average._average_model.state_dict(), average.n_averaged

    with pytest.warns(UserWarning, match=RETURNS):
        script, _ = run(tmp_path, look, Unscheduled(), last=[average], n=1, max_epochs=len(SCRIPT))
    assert equal(script.after[6], script.before[4])
    assert int(script.after[6][2]) == 5
    assert int(script.before[6][2]) == 7


def test_what_other_callbacks_and_the_module_do_to_a_checkpoint_is_not_brought_back(tmp_path):
    class Zeros(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            for value in checkpoint["state_dict"].values():
                value.zero_()

    class Adapter(Net):
        """Saves the weights of its head alone, and a number of its own."""

        number = 0

        def training_step(self, batch, batch_idx):
            self.number += 1
            return super().training_step(batch, batch_idx)

        def on_save_checkpoint(self, checkpoint):
            weights = checkpoint["state_dict"]
            for name in [name for name in weights if not name.startswith("head")]:
                del weights[name]
            checkpoint["number"] = self.number

        def on_load_checkpoint(self, checkpoint):
            self.number = checkpoint["number"]

    with pytest.warns(UserWarning, match=RETURNS):
        script, _ = run(tmp_path, lambda t: (tensors(t), t.lightning_module.number), Adapter(), last=[Zeros()])
    assert equal(script.after[6], script.before[4])


def test_running_statistics_of_a_regularizer_come_back(tmp_path):
    term = Regularizer(CorInfoMax(), layer="encoder", chunk=2)
    with pytest.warns(UserWarning, match=RETURNS):
        script, _ = run(tmp_path, lambda t: (tensors(t), term.state_dict()), last=[term])
    assert equal(script.after[6], script.before[4])
    assert not equal(script.before[6][1], script.before[4][1])


class Change(Callback):
    """Does something to the training in mid-epoch."""

    def __init__(self, change, at=6):
        self.change, self.at = change, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            self.change(trainer, pl_module)


def add_group(trainer, pl_module):
    trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    trainer.lr_scheduler_configs[0].scheduler.base_lrs.append(0.01)


def widen(trainer, pl_module):
    pl_module.extra = torch.nn.Linear(2, 2)


def change_scheduler(trainer, pl_module):
    trainer.lr_scheduler_configs[0].scheduler = LambdaLR(trainer.optimizers[0], lambda step: 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            add_group,
            "parameter groups of the optimizers have changed: 1 of 6 parameters then, 2 of 6, 1 parameters now",
        ),
        (widen, "weights have changed: `extra.weight` and 1 more"),
        (change_scheduler, r"schedulers have changed: \['StepLR'\] then, \['LambdaLR'\] now"),
    ],
)
def test_a_training_that_has_changed_since_is_left_alone(change, words, tmp_path):
    with pytest.warns(UserWarning, match=f"`Rollback` returns to nothing at step 6: since step 4 the {words}") as said:
        script, trainer = run(tmp_path, tensors, first=[Change(change)])
    assert sum("`Rollback`" in str(warning.message) for warning in said) == 1
    assert equal(script.after[6], script.before[6])
    assert trainer.global_step == len(SCRIPT)


def test_a_changed_training_is_saved_at_its_next_healthy_point(tmp_path):
    with pytest.warns(UserWarning, match=RETURNS):
        script, _ = run(tmp_path, tensors, first=[Change(add_group, at=4)])
    assert equal(script.after[6], script.before[4])


class Stubborn(StepLR):
    """Takes no state, after the weights are loaded."""

    def load_state_dict(self, state_dict):
        if state_dict["last_epoch"] != self.last_epoch:
            raise RuntimeError("not mine")
        super().load_state_dict(state_dict)


def test_what_cannot_be_brought_back_whole_is_not_brought_back_at_all(tmp_path):
    class Wayward(Net):
        def configure_optimizers(self):
            [optimizer], [config] = super().configure_optimizers()
            return [optimizer], [{**config, "scheduler": Stubborn(optimizer, 3)}]

    average = EMAWeightAveraging(decay=0.9)

    def look(trainer):
        return tensors(trainer), average._average_model.state_dict(), trainer.optimizers[0].state_dict()

    with pytest.warns(UserWarning, match="`Rollback` cannot bring back .*, and all is as before: RuntimeError"):
        script, trainer = run(tmp_path, look, Wayward(), last=[average])
    assert equal(script.after[6], script.before[6])
    assert trainer.global_step == len(SCRIPT)


def test_a_module_that_a_callback_only_holds_is_left_alone(tmp_path):
    class Holder(Callback):
        def __init__(self):
            self.critic, self.model = torch.nn.Bilinear(2, 2, 1), None

        def on_fit_start(self, trainer, pl_module):
            self.model = pl_module

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.critic.weight.data += 1

    holder = Holder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script, _ = run(tmp_path, lambda t: holder.critic.weight.detach().clone(), first=[holder])
    assert torch.equal(script.after[6], script.before[6])
