"""Weights that a function is given are told of once, and nothing is said of healthy models."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor, WeightSpectrumMonitor
from tests.toys import Toy, batches, fit


class Model(Toy):
    """Any network between 16 features and a loss."""

    def __init__(self, net):
        super().__init__()
        self.encoder, self.head = net, nn.Identity()


class Vision(nn.Module):
    """As timm's: a class token, positions, a block of attention that is written out, a head."""

    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 3, 8))
        self.patch_embed, self.qkv, self.proj = nn.Conv1d(1, 8, 8, stride=8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.patch_embed(x.unsqueeze(1)).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return self.head(self.norm(x)[:, 0])


class Language(nn.Module):
    """Token ids from numbers; its head is tied to the embedding, and called or not."""

    def __init__(self, called):
        super().__init__()
        self.wte, self.block, self.called = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16), called
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x):
        x = self.block(self.wte((x * 3).long().abs() % 11))
        return self.lm_head(x) if self.called else F.linear(x, self.wte.weight)


class Conditioned(nn.Module):
    """A time embedding beside maps."""

    def __init__(self):
        super().__init__()
        self.time_embed, self.body, self.out = nn.Linear(1, 8), nn.Conv1d(1, 8, 3), nn.Conv1d(8, 1, 3)

    def forward(self, x):
        return self.out(self.body(x.unsqueeze(1)) + self.time_embed(x[:, :1]).unsqueeze(2))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, x):
        return self.net(x.view(-1, 2, 8), x.view(-1, 2, 8))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.unused = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.net(x.view(-1, 2, 8))[0]


HEALTHY = {
    "transformer": Whole,
    "vision": Vision,
    "tied, called": lambda: Language(True),
    "tied, not called": lambda: Language(False),
    "conditioned": Conditioned,
    "recurrent": Recurrent,
    "residual": lambda: nn.Sequential(nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten()),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 8)), nn.Linear(8, 2)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(16, 8)), nn.Linear(8, 2)),
}
WORDS = ("never called", "left out")


def said(net, *monitors):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Model(net), monitors or [CollapseMonitor(every_n_steps=2), WeightSpectrumMonitor(every_n_steps=2)])
    return [str(w.message) for w in told if any(words in str(w.message) for words in WORDS)]


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_healthy_models(name):
    assert said(HEALTHY[name]()) == []


def test_weights_that_a_function_is_given_are_told_of_once():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.given, self.unused = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.more = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])

        def forward(self, x):
            x = F.linear(self.first(x), self.given.weight, self.given.bias)
            return x @ self.more[0] @ self.more[1]

    (told,) = said(Functional(), CollapseMonitor(every_n_steps=2))
    assert "`CollapseMonitor`: 2 layer(s) are never called" in told
    assert "`encoder.given`, `encoder.more`" in told


def test_accumulation_is_no_hindrance():
    class Given(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.given = nn.Linear(16, 8), Given(8, 8)

        def forward(self, x):
            return F.linear(self.first(x), self.given.weight)

    with pytest.warns(UserWarning, match=r"1 layer\(s\) are never called"):
        fit(Model(Net()), [CollapseMonitor(every_n_steps=1)], batches(4), accumulate_grad_batches=2)


@pytest.mark.parametrize("make", [WeightSpectrumMonitor, SpectralAlignmentMonitor])
def test_weights_that_are_no_real_matrix_are_counted(make):
    net = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    net.codes = nn.Linear(2, 2, bias=False)
    net.codes.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    net.forward = lambda x: net[2](net[1](net[0](x)))
    (told,) = said(net, make(every_n_steps=2))
    assert f"`{make.__name__}`: 1 weight(s) are no matrix of real numbers" in told
    assert "`encoder.codes.weight` (torch.int8)" in told
