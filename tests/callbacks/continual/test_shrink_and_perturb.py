"""Limits, the formula, when it happens, what stays untouched, and resuming."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_collapse import ShrinkAndPerturb
from tests.toys import QUIET, Toy, batches, weights


class Still(Toy):
    """A learning rate of nothing: only the callback moves it."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Normed(Still):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def fit(model, *callbacks, ckpt_path=None, **kwargs):
    trainer = Trainer(**{**QUIET, "logger": False, "callbacks": list(callbacks), **kwargs})
    trainer.fit(model, batches(), ckpt_path=ckpt_path)
    return trainer


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_first_task_is_left_alone_and_each_later_one_starts_with_it():
    callback, model = ShrinkAndPerturb(shrink=0.5, perturb=0.0), Normed()
    start = flat(model)
    for task in range(3):
        fit(model, callback)
        torch.testing.assert_close(flat(model), start * 0.5**task)


def test_what_is_saved_and_tested_after_a_task_is_what_was_trained():
    callback, model = ShrinkAndPerturb(), Toy()
    fit(model, callback)
    trained = weights(model)
    trainer = Trainer(**{**QUIET, "logger": False, "callbacks": [callback]})
    trainer.validate(model, batches(), verbose=False)
    assert same(trained, weights(model))


def test_warm_and_fresh_are_the_limits():
    model = Normed()
    before = weights(model)
    callback = ShrinkAndPerturb(shrink=1.0, perturb=0.0)
    fit(model, callback)
    fit(model, callback)
    named = dict(model.named_parameters())
    assert all(torch.equal(before[name], p) for name, p in named.items())

    made = []

    def initialize():
        made.append(Normed())
        return made[-1]

    callback = ShrinkAndPerturb(shrink=0.0, perturb=1.0, initialize=initialize)
    fit(model, callback)
    fit(model, callback)
    fresh = made[-1]
    for name, parameter in model.named_parameters():
        expected = fresh.get_parameter(name) if parameter.requires_grad else before[name]
        assert torch.equal(parameter, expected), name
    assert not torch.equal(model.encoder[1].running_mean, fresh.encoder[1].running_mean)  # buffers stay


def test_reset_parameters_draws_what_a_fresh_module_would():
    """Of a linear layer weights and biases are uniform within one over the root of its width."""
    model = Still()
    nn.init.constant_(model.encoder[0].weight, 9.0)
    callback = ShrinkAndPerturb(shrink=0.0, perturb=1.0)
    fit(model, callback)
    fit(model, callback)
    weight = model.encoder[0].weight
    assert weight.abs().max() <= 0.25
    assert weight.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.1)


def test_squared_norms_add_up():
    """Weights and fresh ones are independent: E |theta|^2 = s^2 |theta|^2 + p^2 E |fresh|^2."""

    class Wide(Still):
        def __init__(self):
            super().__init__()
            self.encoder[0], self.encoder[2] = nn.Linear(16, 2048), nn.Linear(2048, 8)

    model = Wide()
    nn.init.normal_(model.encoder[0].weight, std=0.2)
    before = model.encoder[0].weight.detach().square().sum().item()
    callback = ShrinkAndPerturb(shrink=0.4, perturb=0.5)
    fit(model, callback)
    fit(model, callback)
    fresh = 2048 * 16 * 0.25**2 / 3
    after = model.encoder[0].weight.detach().square().sum().item()
    assert after == pytest.approx(0.4**2 * before + 0.5**2 * fresh, rel=0.02)


def test_every_n_steps_and_another_network_each_time():
    class Keep(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(flat(pl_module))

    keep, model = Keep(), Still()
    start = flat(model)
    callback = ShrinkAndPerturb(shrink=0.0, perturb=1.0, every_n_steps=2)
    fit(model, callback, keep, max_epochs=2, accumulate_grad_batches=2)  # 6 batches, 3 steps an epoch
    changes = [i for i in range(12) if not torch.equal(keep.seen[i], keep.seen[i - 1] if i else start)]
    assert changes == [4, 8]  # before the first micro-batches of steps 2 and 4
    assert not torch.equal(keep.seen[4], keep.seen[8])
    again = Keep()
    fit(model, callback, again, accumulate_grad_batches=1)  # a new trainer counts from 0
    assert [i for i in range(1, 6) if not torch.equal(again.seen[i], again.seen[i - 1])] == [2, 4]
    assert not torch.equal(again.seen[2], keep.seen[4])


def test_a_task_may_end_within_a_fit():
    class Boundary(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                callback.finish_task(trainer, pl_module)

    callback, model = ShrinkAndPerturb(shrink=0.5, perturb=0.0), Still()
    start = flat(model)
    fit(model, callback, Boundary(), max_epochs=3)
    torch.testing.assert_close(flat(model), start * 0.5)


def test_a_run_does_not_get_its_own_start_again():
    for seed in range(3):
        torch.manual_seed(seed)
        model = Still()
        start = flat(model)
        callback = ShrinkAndPerturb(shrink=0.0, perturb=1.0, initialize=Still, seed=seed)
        fit(model, callback)
        fit(model, callback)
        assert not torch.isclose(flat(model), start).any()


@pytest.mark.parametrize("initialize", [None, Normed])
def test_random_numbers_of_the_run_are_untouched(initialize):
    model = Normed()
    callback = ShrinkAndPerturb(initialize=initialize)
    fit(model, callback)
    torch.manual_seed(3)
    fit(model, callback)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    fit(Normed())
    torch.manual_seed(3)
    model = Normed()
    torch.manual_seed(3)
    fit(model)
    assert torch.equal(drawn, torch.rand(4))
    assert callback._times == 1


@pytest.mark.parametrize("every_n_steps", [None, 4])
def test_a_resumed_fit_is_the_uninterrupted_one(every_n_steps, tmp_path):
    class Saver(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def begin():
        torch.manual_seed(0)
        callback, model = ShrinkAndPerturb(every_n_steps=every_n_steps), Toy()
        fit(model, callback)
        return callback, model

    callback, whole = begin()
    fit(whole, callback, max_epochs=3)
    callback, half = begin()
    fit(half, callback, Saver(), max_epochs=3)
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed, callback = Toy(), ShrinkAndPerturb(every_n_steps=every_n_steps)
    fit(resumed, callback, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(whole), weights(resumed))
    assert callback.task_index == 2


def test_attention_and_embeddings_can_be_made_anew():
    class Attends(Still):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.table = nn.Embedding(5, 16)
            self.norm = nn.LayerNorm(16)

    model = Attends()
    callback = ShrinkAndPerturb(shrink=0.0, perturb=1.0)
    before = weights(model)
    fit(model, callback)
    fit(model, callback)
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "table.weight"):
        assert not torch.equal(weights(model)[name], before[name])
    assert torch.equal(model.norm.weight, torch.ones(16))
    assert not model.attention.out_proj.bias.any()  # as attention itself starts


class Own(Still):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.part = nn.Module()
        self.part.token = nn.Parameter(torch.ones(3))


def test_parameters_that_cannot_be_made_anew_are_named():
    with pytest.raises(MisconfigurationException, match=r"the module itself \(Own\), part \(Module\) anew.*initial"):
        fit(Own(), ShrinkAndPerturb())
    model, callback = Own(), ShrinkAndPerturb(initialize=Own)
    fit(model, callback)
    fit(model, callback)
    torch.testing.assert_close(model.scale.data, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("initialize", "match"),
    [
        (Toy, r"parameters of Own: scale is \(3,\) here and not there"),
        (lambda: _with_head(3), r"head.weight is \(2, 8\) here and \(3, 8\) there"),
    ],
)
def test_a_fresh_module_of_another_kind_is_refused(initialize, match):
    with pytest.raises(MisconfigurationException, match=match):
        fit(Own(), ShrinkAndPerturb(initialize=initialize))


def test_a_module_that_cannot_be_copied_is_refused():
    model = Still()
    model.stream = (i for i in range(3))
    with pytest.raises(MisconfigurationException, match=r"could not make Still anew.*generator.*initialize="):
        fit(model, ShrinkAndPerturb())


def _with_head(classes) -> LightningModule:
    model = Own()
    model.head = nn.Linear(8, classes)
    return model


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"shrink": -1}, "`shrink`"), ({"perturb": float("nan")}, "`perturb`"), ({"every_n_steps": 0}, "at least 1")],
)
def test_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        ShrinkAndPerturb(**arguments)
