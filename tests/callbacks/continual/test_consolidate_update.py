"""What is left of a task's change, what is not touched, growing matrices and resuming."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_collapse import ConsolidateUpdate, TaskBoundary
from lightning_collapse.functional.task_weights import consolidated_update
from tests.continual import Learner, ordered, steady, training
from tests.toys import QUIET, weights

HEAD = "head.weight"


def fit(model, *callbacks, seed=0, data=None, ckpt_path=None, **kwargs):
    torch.manual_seed(seed)
    trainer = Trainer(**{**QUIET, "logger": False, "callbacks": list(callbacks), **kwargs})
    trainer.fit(model, data or training(seed), ckpt_path=ckpt_path)
    return trainer


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_weights_are_those_before_and_what_the_formula_keeps():
    model, plain, callback = Learner(), Learner(), ConsolidateUpdate(gamma=0.0)
    past = []
    for task in range(3):
        plain.load_state_dict(model.state_dict())
        before = model.head.weight.detach().clone()
        fit(plain, seed=task)
        fit(model, callback, seed=task)
        change = (plain.head.weight - before).detach()
        new = consolidated_update(change, torch.stack(past) if past else None, gamma=0.0)
        torch.testing.assert_close(model.head.weight.detach(), before + new, rtol=1e-5, atol=1e-6)
        got = (model.head.weight.detach() - before).flatten()
        for row in past:
            assert torch.nn.functional.cosine_similarity(row, got, dim=0).abs() < 1e-4
        past.append(new.flatten())
        assert torch.equal(plain.head.bias, model.head.bias)
    assert len(callback.state_dict()["past"][HEAD]) == 3


def test_it_is_the_identity_at_its_limits_and_leaves_what_was_not_trained():
    model, plain, callback = Learner(), Learner(), ConsolidateUpdate(energy=1.0, gamma=1.0)
    for task in range(2):
        fit(model, callback, seed=task)
        fit(plain, seed=task)
    assert same(weights(plain), weights(model))

    frozen = Learner()
    frozen.configure_optimizers = lambda: torch.optim.SGD(frozen.body.parameters(), lr=0.1)
    start = frozen.head.weight.detach().clone()
    callback = ConsolidateUpdate()
    for task in range(2):
        fit(frozen, callback, seed=task)
    assert torch.equal(frozen.head.weight, start)
    assert HEAD not in callback.state_dict()["past"]


def test_convolutions_half_weights_and_a_task_within_a_fit():
    class Convolving(Learner):
        def __init__(self):
            super().__init__()
            self.body[0] = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 1), nn.Flatten(1))

    callback, model = ConsolidateUpdate(parameters=["body.0.*.weight"]), Convolving()
    fit(model, callback, TaskBoundary(every_n_epochs=1), max_epochs=2, precision="bf16-true")
    assert list(callback.state_dict()["past"]) == ["body.0.1.weight"]
    assert callback.state_dict()["past"]["body.0.1.weight"].shape == (2, 2)


def test_a_matrix_that_has_grown_forgets_its_past_and_says_so():
    callback, model = ConsolidateUpdate(), Learner()
    fit(model, callback)
    model.head = nn.Linear(12, 5)
    with pytest.warns(UserWarning, match="`head.weight` has 60 entries and had 36"):
        fit(model, callback, seed=1)
    assert callback.state_dict()["past"][HEAD].shape == (1, 60)


def test_a_change_that_is_no_number_stays_out(recwarn):
    callback, model = ConsolidateUpdate(parameters=[HEAD]), Learner()

    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.head.weight.data[0, 0] = torch.nan

    fit(model, callback, Spoil())
    assert any("consolidating `head.weight` failed" in str(warning.message) for warning in recwarn)
    assert not callback.state_dict()["past"]


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    class Saver(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    callback, whole = ConsolidateUpdate(), steady()
    fit(whole, callback, data=ordered(0))
    fit(whole, callback, Saver(), data=ordered(1), max_epochs=2)
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed, again = steady(seed=5), ConsolidateUpdate()
    fit(resumed, again, data=ordered(1), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(whole), weights(resumed))
    assert same(callback.state_dict()["past"], again.state_dict()["past"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy": 0.0}, "`energy` must be above 0"),
        ({"gamma": 1.5}, "`gamma` must be from 0 to 1, got 1.5"),
        ({"parameters": "head"}, "`parameters` takes a list of names"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConsolidateUpdate(**arguments)


def test_patterns_that_match_no_matrix_are_refused():
    with pytest.raises(MisconfigurationException, match=r"'head.bias'.* matches no trainable.*head.weight"):
        fit(Learner(), ConsolidateUpdate(parameters=["head.bias"]))
    with pytest.raises(MisconfigurationException, match="It has: none"):
        fit(Learner().requires_grad_(False), ConsolidateUpdate())
