"""What a first training step tells of the order of modules, and that it leaves nothing behind."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_collapse.monitoring.execution_order import ExecutionOrder
from lightning_collapse.utilities.modules import Execution


class Net(nn.Module):
    """Registered the other way round."""

    def __init__(self, mode: str = "") -> None:
        super().__init__()
        self.mode = mode
        self.unused, self.head, self.teacher, self.encoder = (nn.Linear(4, 4) for _ in range(4))
        self.encoder.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.encoder, x, use_reentrant=True) if self.mode == "checkpoint" else self.encoder(x)
        with torch.no_grad():
            wanted = self.teacher(x)
        return (self.head(h) - wanted).square().mean()


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("mode", ["", "checkpoint"])
def test_order_and_what_is_beside(mode: str) -> None:
    model = Net(mode)
    order = ExecutionOrder(model)
    order.armed = True
    loss = model(torch.randn(2, 4, requires_grad=True))
    order.armed = False
    loss.backward()
    model.unused(torch.zeros(1, 4))  # not in the step
    assert order.pop() == Execution(("encoder", "teacher", "head"), ("teacher",))
    assert not hooks_on(model)


def test_layers_that_are_made_by_the_first_batch() -> None:
    model = Net()
    model.head, model.encoder = nn.LazyLinear(4), nn.LazyLinear(4)
    order = ExecutionOrder(model)
    order.armed = True
    model(torch.randn(2, 4))
    assert order.pop() == Execution(("encoder", "teacher", "head"), ("teacher",))


def test_nothing_ran() -> None:
    model = Net()
    order = ExecutionOrder(model)
    model(torch.randn(2, 4))  # not armed
    assert order.pop() is None
    order.remove()
    assert not hooks_on(model)


def test_compiled_models_are_not_listened_to() -> None:
    model = Net()
    model.encoder = torch.compile(model.encoder, backend="eager")
    order = ExecutionOrder(model)
    assert not hooks_on(model)
    assert order.pop() is None


def test_copies_carry_nothing() -> None:
    model = Net()
    order = ExecutionOrder(model)
    order.armed = True
    copy, pickled = deepcopy(model), pickle.loads(pickle.dumps(model))
    copy.unused(torch.zeros(1, 4))
    pickled.unused(torch.zeros(1, 4))
    assert order.pop() is None


def test_what_fails_is_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    model = Net()
    order = ExecutionOrder(model, "CollapseMonitor")
    monkeypatch.setattr(order, "_note", fail)
    order.armed = True
    with pytest.warns(UserWarning, match="CollapseMonitor.*broken.*registration"):
        model(torch.randn(2, 4))
    assert not hooks_on(model)
    assert order.pop() is None


class Waveform(nn.Module):
    """Its first module receives ``(N, T)`` and makes maps of them itself: no condition."""

    def __init__(self) -> None:
        super().__init__()
        self.extractor = nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3))
        self.encoder, self.label = nn.Conv1d(4, 4, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.extractor(x)
        return self.encoder(x + self.label(y).unsqueeze(2))


def test_conditions_are_left_out_and_waveforms_are_not() -> None:
    model = Waveform()
    order = ExecutionOrder(model)
    order.armed = True
    model(torch.randn(2, 16), torch.randn(2, 3))
    found = order.pop()
    assert found is not None
    assert found.order[0] == "extractor"
    assert found.order[-1] == "encoder"
    assert "label" not in found.order


class Places(nn.Module):
    """What makes positions out of a table, of numbers alone, and out of data."""

    def __init__(self, fed: bool = True) -> None:
        super().__init__()
        self.fed = fed
        self.register_buffer("table", torch.randn(1, 5, 2))
        self.query = nn.Parameter(torch.randn(1, 5, 4))
        self.bias, self.grow = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4)), Grow()
        self.draw, self.mix, self.embed, self.norm = Draw(), Mix(), nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bias(self.table)
        if self.fed:
            h = self.mix(self.query, [self.norm(self.embed(x))]) + self.grow(5, (1, 2)) + h + self.draw(5)
        return h.sum()


class Grow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, length: int, size: tuple[int, int]) -> Tensor:
        return self.weight.expand(1, length, 4)


class Draw(nn.Module):
    """A generator, which draws its own noise."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, length: int) -> Tensor:
        return self.map(torch.randn(1, length, 4))


class Mix(nn.Module):
    """Learned queries beside features that come in a list."""

    def forward(self, query: Tensor, features: list[Tensor]) -> Tensor:
        return query + features[0]


@pytest.mark.parametrize("fed", [True, False])
def test_what_makes_positions_of_the_models_own_tensors_is_left_out_where_data_comes_in(fed: bool) -> None:
    model = Places(fed)
    order = ExecutionOrder(model)
    order.armed = True
    model(torch.randn(2, 5, 3))
    found = order.pop()
    assert found is not None
    tables = ("bias", "bias.0", "bias.1", "bias.2")
    assert found.order == (("embed", "norm", "mix", "draw", "draw.map") if fed else tables)
