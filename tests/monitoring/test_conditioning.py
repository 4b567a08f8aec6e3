"""Layers that hold few directions by design, and layers that only look so."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_collapse.monitoring import CallRecord, read_loss
from lightning_collapse.monitoring.conditioning import (
    INDEX,
    NO_GRADIENT,
    NUMBER,
    POSITIONS,
    ROUTER,
    SAME,
    VARIANCE,
    WAVES,
)
from lightning_collapse.monitoring.loss_task import VALUE

N, D = 16, 12


def conditioning(net, step):
    record = CallRecord(net)
    record.armed = True
    loss = step()
    use = read_loss(loss, None, record)
    record.clear()
    return dict(use.conditioning)


class Denoiser(nn.Module):
    """A time step enters as a number or as waves, a class as an index."""

    def __init__(self, waves=False):
        super().__init__()
        self.waves = waves
        self.time = nn.Sequential(nn.Linear(8 if waves else 1, 16), nn.SiLU(), nn.Linear(16, 16))
        self.shift = nn.Linear(16, 8)
        self.label = nn.Embedding(4, 8)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t, y):
        angles = t[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1) if self.waves else t[:, None])
        shift = self.shift(F.silu(time)) + self.label(y)
        return self.last(F.relu(self.first(x) + shift[:, :, None, None]))


@pytest.mark.parametrize("waves", [False, True])
def test_embeddings_of_time_and_class(waves):
    net = Denoiser(waves)
    x, t, y = torch.randn(N, 3, 5, 5), 10 * torch.rand(N), torch.arange(N) % 4
    found = conditioning(net, lambda: net(x, t, y).square().mean())
    reason = WAVES if waves else NUMBER
    assert found == {**dict.fromkeys(["time", "time.0", "time.1", "time.2", "shift"], reason), "label": INDEX}


def test_a_network_that_fits_a_curve():
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    t = torch.randn(N, 1)
    assert conditioning(net, lambda: F.mse_loss(net(t), t.sin())) == dict.fromkeys("01234", NUMBER)


class Transformer(nn.Module):
    """Experts behind a router, and a table of positions."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(30, 8), nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.score, self.norm, self.gate = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.Linear(8, 30)

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = self.norm(x + self.attention(x, x, x)[0])
        looks = (self.score(x) @ x.transpose(1, 2) / math.sqrt(8)).softmax(-1)
        x = looks @ x
        weights, chosen = self.router(x).softmax(-1).topk(2)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        picked = outputs.gather(2, chosen[..., None].expand(*chosen.shape, 8))
        x = x + (weights[..., None] * picked).sum(-2)
        return self.head(x * self.gate(x).sigmoid())


def test_positions_and_routers_and_no_other_attention():
    net, tokens = Transformer(), torch.randint(30, (N, 6))
    found = conditioning(net, lambda: F.cross_entropy(net(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    assert found == {"places": POSITIONS, "router": ROUTER}


def test_variance_heads():
    net = nn.ModuleDict({"body": nn.Linear(D, 8), "mean": nn.Linear(8, 4), "log_variance": nn.Linear(8, 4)})
    net["decoder"] = nn.Linear(4, D)
    x = torch.randn(N, D)

    def vae():
        h = net["body"](x).relu()
        mean, log_variance = net["mean"](h), net["log_variance"](h)
        out = net["decoder"](mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
        return F.mse_loss(out, x) - 0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()

    assert conditioning(net, vae) == {"log_variance": VARIANCE}

    def gaussian():
        h = net["body"](x).relu()
        mean, log_variance = net["mean"](h), net["log_variance"](h)
        return ((mean - x[:, :4]) ** 2 * (-log_variance).exp() + log_variance).mean()

    assert conditioning(net, gaussian) == {"log_variance": VARIANCE}

    def softened():
        h = net["body"](x).relu()
        mean, deviation = net["mean"](h), F.softplus(net["log_variance"](h)) + 1e-4
        out = net["decoder"](mean + deviation * torch.randn_like(mean))
        return F.mse_loss(out, x) + (mean**2 + deviation**2 - 2 * deviation.log()).mean()

    assert conditioning(net, softened) == {"log_variance": VARIANCE}


@pytest.mark.parametrize("shared", [False, True])
def test_what_leads_to_the_value_of_a_state_alone(shared):
    net = nn.ModuleDict({"body": nn.Linear(D, 8), "actor": nn.Linear(8, 3), "critic": nn.Linear(8, 8)})
    net["trunk"], net["value"] = nn.Linear(D, 8), nn.Linear(8, 1)
    x, returns = torch.randn(N, D), torch.randn(N)

    def step():
        scores = net["actor"](net["body"](x).relu())
        chosen = scores.log_softmax(1).gather(1, scores.softmax(1).multinomial(1)).squeeze(1)
        values = net["value"](net["critic"](net["body" if shared else "trunk"](x).relu()).relu()).squeeze(1)
        return F.mse_loss(values, returns) - (chosen * (returns - values).detach()).mean()

    found = {name for name, reason in conditioning(net, step).items() if reason == VALUE}
    assert found == {
        f"{name}{end}" for name in ("value", "critic", *["trunk"] * (not shared)) for end in ("", ".input")
    }


@pytest.mark.parametrize("kind", ["labels", "softmax", "contrast", "tables", "waves and data", "number and data"])
def test_what_only_looks_so(kind):
    net = nn.ModuleDict({"body": nn.Linear(D, 16), "head": nn.Linear(16, 4), "user": nn.Embedding(9, 8)})
    net.update({"item": nn.Embedding(9, 8), "mix": nn.Linear(24, 8), "time": nn.Linear(1, 12)})
    x, y = torch.randn(N, D), torch.arange(N) % 4
    t = torch.rand(N, 1)
    wanted = {"time": NUMBER} if kind == "number and data" else {}

    def step():
        h = net["body"](x).relu()
        if kind == "labels":
            return F.cross_entropy(net["head"](h), y)
        if kind == "softmax":
            p = net["head"](h).softmax(1)
            return -(p * F.one_hot(y, 4)).sum(1).mean() + (p * p.log()).sum(1).mean()
        if kind == "contrast":
            z = F.normalize(h, dim=1)
            near = (z @ z.T).exp()
            return -(near.diagonal() / near.sum(1)).log().mean()
        if kind == "tables":  # users and items are all there is to say
            return (net["user"](y) * net["item"](y.flip(0))).sum(1).square().mean()
        if kind == "waves and data":
            angles = t * torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003])
            return net["mix"](torch.cat([angles.sin(), angles.cos(), x], dim=1)).square().mean()
        return net["mix"](torch.cat([net["time"](t), x], dim=1)).square().mean()

    assert conditioning(net, step) == wanted


def test_what_no_gradient_passes_through():
    net = nn.ModuleDict({"student": nn.Linear(D, D), "teacher": nn.Linear(D, D), "both": nn.Linear(D, D)})
    x = torch.randn(N, D)

    def step():
        with torch.no_grad():
            given = net["both"](net["teacher"](x))
        return F.mse_loss(net["both"](net["student"](x)), given)

    assert conditioning(net, step) == {"teacher": NO_GRADIENT}


class Map(nn.Module):
    """Makes rows of its own, of a grid or of noise, or of what it finds in a box."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(2, 8, 1)

    def forward(self, source, length, noise=False):
        box = getattr(source, "x", None)
        grid = torch.stack([torch.arange(length).sin(), torch.arange(length).cos()])[None]
        rows = torch.randn(N, 2, length) if noise else grid if box is None else box
        return self.layer(rows).expand(N, -1, -1)


@pytest.mark.parametrize("kind", ["grid", "noise", "box"])
def test_maps_of_positions_and_generators(kind):
    class Box:
        x = torch.randn(1, 2, 6)

    net = nn.ModuleDict({"map": Map(), "body": nn.Conv1d(2, 8, 1)})
    x = torch.randn(N, 2, 6)

    def step():
        made = net["map"](Box() if kind == "box" else None, 6, noise=kind == "noise")
        return (net["body"](x) + made).square().mean()

    assert conditioning(net, step) == (dict.fromkeys(["map", "map.layer"], SAME) if kind == "grid" else {})
