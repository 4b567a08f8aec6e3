"""What is an activation function, whoever wrote it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.utilities.activations import is_activation


class Function(nn.Module):
    """As in ``transformers``, ``timm`` and everybody's ``Lambda`` layer."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


class Snake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin() ** 2 / self.alpha


class Counter(nn.Module):
    """Changes itself when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.relu()


class DropPath(nn.Module):
    """Leaves out whole rows in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1) > 0.5) * 2 if self.training else x


class QuickGELU(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(1.702 * input)


class NewGELUActivation(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return new_gelu(input)


class ClippedGELU(nn.Module):
    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return torch.clip(new_gelu(x), self.low, self.high)


class Laplace(nn.Module):
    """With defaults, as that of ``transformers``."""

    def forward(self, input: Tensor, mu: float = 0.707107, sigma: float = 0.282095) -> Tensor:
        return 0.5 * (1 + torch.erf((input - mu) / (sigma * math.sqrt(2.0))))


class Residual(nn.Module):
    """A stream that something is added to."""

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        return x if branch is None else x + branch


class Holder(nn.Module):
    """A block with a function inside: that one counts."""

    def __init__(self) -> None:
        super().__init__()
        self.act = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(x)


class Scores(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().softmax(-1).to(x)


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


BENDS = [
    nn.ReLU(),
    nn.GELU(),
    nn.SiLU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.PReLU(),
    nn.PReLU(3),
    nn.RReLU(),
    nn.ReLU(inplace=True),
]
BENDS += [Function(new_gelu), Function(torch.relu), Function(lambda x: x * x.sigmoid()), Function(torch.sin), Counter()]
BENDS += [QuickGELU(), NewGELUActivation(), ClippedGELU(-10.0, 2.0), Laplace(), Function(lambda x: x.relu().square())]
STRAIGHT = [nn.Softmax(-1), nn.LogSoftmax(0), nn.Softmin(1), nn.GLU(), nn.MultiheadAttention(4, 2), nn.Identity()]
STRAIGHT += [
    nn.Dropout(0.5),
    nn.LayerNorm(4),
    nn.LayerNorm(4, elementwise_affine=False),
    nn.BatchNorm1d(4, affine=False),
]
STRAIGHT += [
    nn.Flatten(),
    nn.MaxPool1d(1),
    nn.CrossEntropyLoss(),
    nn.Linear(4, 4),
    nn.Sequential(nn.ReLU()),
    nn.Module(),
]
STRAIGHT += [Function(lambda x: x.softmax(-1)), Function(lambda x: 2 * x), Function(lambda x: x / x.norm()), Snake()]
STRAIGHT += [
    Function(lambda x: x.mean()),
    Function(lambda x: x[:1]),
    Function(lambda x: x.cumsum(0)),
    Function(torch.rand_like),
]
STRAIGHT += [Residual(), Holder(), Scores(), DropPath(), Function(lambda x: x + 1), Function(lambda x: 0.5 - 2 * x)]


@pytest.mark.parametrize("module", BENDS, ids=lambda module: type(module).__name__)
def test_bends(module: nn.Module) -> None:
    assert is_activation(module)


@pytest.mark.parametrize("module", STRAIGHT, ids=lambda module: type(module).__name__)
def test_others(module: nn.Module) -> None:
    assert not is_activation(module)


def test_nothing_is_left_of_the_question() -> None:
    counter, noise = Counter(), Function(torch.rand_like)
    called: list[int] = []
    counter.register_forward_hook(lambda *_: called.append(1))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert is_activation(counter)
    assert not is_activation(noise)
    assert (counter.calls, called) == (0, [])
    assert torch.equal(before, torch.get_rng_state())
