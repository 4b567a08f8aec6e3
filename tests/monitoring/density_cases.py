"""Small training steps whose loss is a density, or reads more than one input, for the table of ``loss_cases``."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, NegativeBinomial, Normal, Poisson, StudentT
from torch.nn import functional as F  # noqa: N812

from tests.monitoring.loss_cases import HEAD, IS_TARGET, LABELED, PIXELS, WORDS, C, D, N, Net, X, row

torch.manual_seed(2)
CATEGORIES, ONE, TWO = torch.arange(N) % WORDS, X[:, 0].exp(), X[:, :2].roll(1, 0)
COUNTS = torch.arange(N).remainder(5).float()
MIXED = {"category": CATEGORIES, "x": X, "y": CATEGORIES + 0.1 * ONE}
BOTH = {"category": "input", "x": "input", "y": "target"}
BRIGHT = {"x": PIXELS, "y": (PIXELS + 0.5 * PIXELS.roll(1, 0) > 0.5).float()}
MEASURED, VECTORS, COUNTED = {"x": X, "y": ONE}, {"x": X, "y": TWO}, {"x": X, "y": COUNTS}
ITSELF = {"x": X[:, :1].clone(), "y": X[:, :1] + 0.1 * X[:, 1:2]}


def _scores(net: Net, batch: Any) -> Tensor:
    return net.scores(batch["x"])


@row("regression from categories and numbers", MIXED, "regression", 1, {"one"}, BOTH)
def _(net: Net, batch: Any) -> Tensor:
    return F.mse_loss(net.one(net.table(batch["category"]) + net.features(batch["x"])).squeeze(1), batch["y"])


@row("regression of one number from one", ITSELF, "regression", 1, {"one"}, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.mse_loss(net.one(net.line(batch["x"]).relu()), batch["y"])


@row("bright regions", BRIGHT, "multi-label", C, {"per_pixel"}, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(net.per_pixel(net.maps(batch["x"]))[:, :3], batch["y"])


@row("normal density", VECTORS, "regression", C, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    mean, scale = _scores(net, batch).chunk(2, dim=1)
    return -Normal(mean, F.softplus(scale)).log_prob(batch["y"]).mean()


@row("parts that are counted from the end", VECTORS, "regression", C, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    scores = _scores(net, batch)
    return ((scores[:, :-2] - batch["y"]) ** 2 + (scores[:, -2:] - batch["y"]) ** 2).mean()


@row("normal density, written by hand", VECTORS, "regression", C, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    mean, log_variance = _scores(net, batch).split([2, 2], dim=1)
    return 0.5 * ((batch["y"] - mean).square() * (-log_variance).exp() + log_variance).mean()


@row("Student's density, standardized", MEASURED, "regression", C, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    freedom, place, scale, _ = _scores(net, batch).unbind(1)
    y = (batch["y"] - batch["y"].mean()) / batch["y"].std()
    return -StudentT(2 + F.softplus(freedom), place, F.softplus(scale)).log_prob(y).mean()


SERIES = {"x": X, "y": (X.roll(1, 1) * X.std(1, keepdim=True) + X.mean(1, keepdim=True))}


@row("Student's density, every series standardized", SERIES, "regression", D, {"decoder", "decoder.2"}, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    features = net.features(batch["x"])
    y = (batch["y"] - batch["x"].mean(1, keepdim=True)) / batch["x"].std(1, keepdim=True)
    freedom, scale = (F.softplus(part) for part in net.head(features)[:, :2].unbind(1))
    return -StudentT(2 + freedom[:, None], net.decoder(features), scale[:, None]).log_prob(y).mean()


@row("mixture density", MEASURED, "regression", C, {"head"}, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    features = net.features(batch["x"])
    components = Normal(net.head(features), F.softplus(net.other(features)))
    mixture = MixtureSameFamily(Categorical(logits=net.latent(net.mean(features))[:, :C]), components)
    return -mixture.log_prob(batch["y"]).mean()


@row("Poisson's density", COUNTED, "regression", 1, {"one"}, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return -Poisson(F.softplus(net.one(net.features(batch["x"])).squeeze(1))).log_prob(batch["y"]).mean()


@row("Poisson's loss", COUNTED, "regression", 1, {"one"}, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.poisson_nll_loss(net.one(net.features(batch["x"])).squeeze(1), batch["y"])


@row("negative binomial density", COUNTED, "regression", C, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    total, logits = _scores(net, batch)[:, :2].unbind(1)
    return -NegativeBinomial(F.softplus(total), logits=logits).log_prob(batch["y"]).mean()


@row("probability of the class", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return -Categorical(logits=_scores(net, batch)).log_prob(batch["y"]).mean()


@row("flow", {"x": X}, "", 0, set(), {"x": "weight"})
def _(net: Net, batch: Any) -> Tensor:
    one, two = batch["x"][:, :C], batch["x"][:, C : 2 * C]
    logs = []
    for scale, shift in ((net.head, net.other), (net.other, net.head), (net.head, net.other)):
        features = net.features(F.pad(one, (0, D - C)))
        logs.append(scale(features).tanh())
        one, two = two * logs[-1].exp() + shift(features), one
    return 0.5 * (one.square() + two.square()).sum(1).mean() - torch.stack(logs).sum(2).mean()


EVENTS = {"x": X, "time": ONE, "seen": (COUNTS > 1).float()}


@row("times of events", EVENTS, "", 0, set(), {"x": "input", "time": "unused", "seen": "unused"})
def _(net: Net, batch: Any) -> Tensor:
    order = batch["time"].argsort(descending=True)
    risk = net.one(net.features(batch["x"])).squeeze(1)[order]
    return -((risk - risk.logcumsumexp(0)) * batch["seen"][order]).mean()


PLACES = {"user": CATEGORIES, "item": CATEGORIES.roll(3)}


@row("preferences of users", PLACES, "self-supervised", 0, set(), {"user": "input", "item": "input"})
def _(net: Net, batch: Any) -> Tensor:
    user, item, other = net.table(batch["user"]), net.table(batch["item"]), net.table(batch["item"].roll(1))
    return -F.logsigmoid((user * item).sum(1) - (user * other).sum(1)).mean()
