"""Whatever a pass over data changes is put back, also when it raises."""

import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

from lightning_collapse import WeightPenalty
from lightning_collapse.callbacks.evaluation.preserved_fit import preserved_fit
from lightning_collapse.penalties import MAS, RWalk, SynapticIntelligence
from lightning_collapse.utilities.preserved_state import preserved_state
from tests.toys import Toy, fit


class Moving(nn.Module):
    """Its forward writes into a buffer, replaces one, resizes one and makes one."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.lstm = nn.BatchNorm1d(3), nn.Dropout(), nn.LSTM(3, 2, dropout=0.5, num_layers=2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("none", None)
        self.norm.eval()

    def train(self, mode=True):
        raise AssertionError("`train` may do anything")

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        self.none = torch.ones(2)
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.ones(4), persistent=False)
        self.norm.running_mean.add_(1)
        return self.lstm(self.drop(self.norm(x)))[0]


def facts(model):
    """All that is to stay, with the identity of what is only referred to."""
    return (
        [(name, m.training, getattr(m, "dropout", None)) for name, m in model.named_modules()],
        {name: (id(b), b.tolist()) for name, b in model.named_buffers()},
        model.none,
        [(p.requires_grad, id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        torch.is_inference_mode_enabled(),
    )


def disturb(model):
    """Everything a user's function might do."""
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    output = model(torch.randn(5, 3))
    if output.requires_grad:
        output.sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.drop.training = True
    random.random(), np.random.rand(), torch.rand(1)
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_everything_is_put_back(fails, gradients, autocast, around):
    model = Moving()
    first, second, *_ = model.parameters()
    first.grad, second.requires_grad = torch.ones_like(first), False
    dtype = torch.get_autocast_dtype("cpu")
    with around(), torch.autocast("cpu", torch.bfloat16):
        before = facts(model)
        try:
            with preserved_state(model, gradients=gradients, autocast=autocast):
                assert torch.is_grad_enabled() == gradients
                assert torch.is_autocast_enabled("cpu") == autocast
                if gradients:
                    assert not torch.is_inference_mode_enabled()
                    assert model.lstm.dropout == 0
                disturb(model)
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert facts(model) == before
    assert torch.get_autocast_dtype("cpu") == dtype


class Averaged(torch.optim.SGD):
    """As a schedule-free optimizer: trains in one place, and another is for use."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.training = True

    def _move(self, by):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(by)

    def eval(self):
        if self.training:
            self._move(1 / 3)
        self.training = False

    def train(self):
        if not self.training:
            self._move(-1 / 3)
        self.training = True


@pytest.mark.parametrize("training", [True, False])
def test_a_fit_is_preserved_and_the_weights_for_use_are_in_place(training):
    class Model(Toy):
        def configure_optimizers(self):
            return Averaged(self.parameters(), lr=0.01)

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            [optimizer], stage = trainer.optimizers, trainer.state.stage
            if not training:
                optimizer.eval()
            before = [p.detach().clone() for p in pl_module.parameters()]
            with preserved_fit(trainer, pl_module):
                assert trainer.validating
                for parameter, trained in zip(pl_module.parameters(), before, strict=True):
                    torch.testing.assert_close(parameter.detach(), trained + (1 / 3 if training else 0))
            assert optimizer.training == training
            assert trainer.state.stage == stage
            assert all(torch.equal(*pair) for pair in zip(pl_module.parameters(), before, strict=True))
            optimizer.train()
            seen.append(batch_idx)

    seen = []
    fit(Model(), [Looks()])
    assert seen


@pytest.mark.parametrize("penalty", [SynapticIntelligence(), RWalk()])
def test_a_penalty_that_follows_steps_refuses_weights_that_are_replaced(penalty):
    class Model(Toy):
        def configure_optimizers(self):
            return Averaged(self.parameters(), lr=0.01)

    with pytest.raises(MisconfigurationException, match=f"{type(penalty).__name__}.*Averaged replaces them"):
        fit(Model(), [WeightPenalty(penalty)])


def test_a_penalty_anchors_the_weights_for_use():
    class Model(Toy):
        def forward(self, x):
            return self.head(self.encoder(x))

        def configure_optimizers(self):
            return Averaged(self.parameters(), lr=0.01)

    model, penalty = Model(), MAS()
    with pytest.warns(UserWarning, match="not those that task 0 has ended with"):
        fit(model, [WeightPenalty(penalty)])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(penalty.state["anchor"][name], parameter.detach() + 1 / 3)
