"""Small training steps of every kind of loss, with what their graph is to tell."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

N, D, C, WORDS, LENGTH = 16, 12, 4, 30, 6
Row = tuple[Callable[["Net", Any], Tensor], Any, str, int, set[str], dict[str, str]]
ROWS: dict[str, Row] = {}


class Residual(nn.Module):
    """A sum of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = x + self.second(x.relu())
        return out


class Similarity(nn.Module):
    """Cosines of all pairs, times a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.scale.exp() * (F.normalize(one, dim=1) @ F.normalize(other, dim=1).T)


class Net(nn.Module):
    """Parts of many models; a case uses some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU())
        self.head = nn.Linear(16, C)
        self.other = nn.Linear(16, C)
        self.one = nn.Linear(16, 1)
        self.decoder = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, D))
        self.table = nn.Embedding(WORDS, 16)
        self.mixer = nn.LSTM(16, 16, batch_first=True)
        self.vocabulary = nn.Linear(16, WORDS)
        self.mean, self.log_variance, self.latent = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 16)
        self.projector, self.predictor = nn.Linear(16, 8), nn.Linear(8, 8)
        self.teacher = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 8)).requires_grad_(False)
        self.critic = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 1))
        self.maps = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.per_pixel = nn.Conv2d(8, C, 1)
        self.criterion = nn.CrossEntropyLoss()
        self.residual, self.similarity = Residual(), Similarity()
        self.line = nn.Linear(1, 16)

    def features(self, x: Tensor) -> Tensor:
        """Of the body."""
        out: Tensor = self.body(x)
        return out

    def scores(self, x: Tensor) -> Tensor:
        """Of the head."""
        out: Tensor = self.head(self.body(x))
        return out

    def words(self, tokens: Tensor) -> Tensor:
        """A score for every word at every position."""
        out: Tensor = self.vocabulary(self.mixer(self.table(tokens))[0])
        return out


def row(name: str, batch: Any, task: str, directions: int, outputs: set[str], roles: dict[str, str]) -> Any:
    """Register a step."""

    def register(step: Callable[[Net, Any], Tensor]) -> Callable[[Net, Any], Tensor]:
        ROWS[name] = (step, batch, task, directions, outputs, roles)
        return step

    return register


torch.manual_seed(1)
X, Y = torch.randn(N, D), torch.arange(N) % C
REAL, MANY = torch.randn(N, C), (torch.randn(N, C) > 0).float()
TOKENS = torch.randint(1, WORDS, (N, LENGTH))
MASKED = TOKENS.masked_fill(torch.arange(N * LENGTH).view(N, LENGTH) % 3 == 0, 0)
MASKED_LABELS = TOKENS.masked_fill(MASKED != 0, -100)
PIXELS, REGIONS = torch.randn(N, 3, 5, 5), torch.randint(C, (N, 5, 5))
LABELED, HEAD, IS_TARGET = {"x": X, "y": Y}, {"head"}, {"x": "input", "y": "target"}
UNUSED = {"x": "input", "y": "unused"}
WORD_HEAD, ONLY_TOKENS = {"vocabulary"}, {"tokens": "own target"}
LAST_OF_DECODER = {"decoder", "decoder.2"}


@row("classification", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.scores(batch["x"]), batch["y"])


@row("classification by a module", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    out: Tensor = net.criterion(net.scores(batch["x"]), batch["y"])
    return out


@row("classification, smoothed", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.scores(batch["x"]), batch["y"], label_smoothing=0.1)


@row("classification, soft labels", {"x": X, "y": REAL.softmax(1)}, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.scores(batch["x"]), batch["y"])


@row("classification, one-hot by hand", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return -(F.one_hot(batch["y"], C) * net.scores(batch["x"]).log_softmax(1)).sum(1).mean()


@row("classification, picked by hand", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return -net.scores(batch["x"]).log_softmax(1)[torch.arange(N), batch["y"]].mean()


@row("classification, mixup of losses", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    order = torch.arange(N).roll(1)
    scores = net.scores(0.7 * batch["x"] + 0.3 * batch["x"][order])
    return 0.7 * F.cross_entropy(scores, batch["y"]) + 0.3 * F.cross_entropy(scores, batch["y"][order])


@row("classification, mixup of labels", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    order, labels = torch.arange(N).roll(1), F.one_hot(batch["y"], C).float()
    scores = net.scores(0.7 * batch["x"] + 0.3 * batch["x"][order])
    return F.cross_entropy(scores, 0.7 * labels + 0.3 * labels[order])


@row("classification, squared error and a penalty by hand", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    error = (net.scores(batch["x"]) - F.one_hot(batch["y"], C)).square().sum(1).mean()
    return 0.5 * (error + 1e-3 * net.head.weight.square().sum() + 1e-3 * net.body[0].weight.norm())


@row("binary classification", {"x": X, "y": MANY[:, 0].clone()}, "classification", 1, {"one"}, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(net.one(net.features(batch["x"])).squeeze(1), batch["y"])


@row("regression", {"x": X, "y": REAL}, "regression", C, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.mse_loss(net.scores(batch["x"]), batch["y"])


@row("regression by hand", {"x": X, "y": REAL}, "regression", C, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return (batch["y"] - net.scores(batch["x"])).pow(2).mean()


@row("regression, standardized", {"x": X, "y": 5 + 3 * REAL}, "regression", C, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    y = batch["y"]
    return F.huber_loss(net.scores(batch["x"]), (y - y.mean(0)) / y.std(0))


@row("multi-label", {"x": X, "y": MANY}, "multi-label", C, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(net.scores(batch["x"]), batch["y"])


TAGS = torch.randint(C, (N, LENGTH))
TAGGED = {"tokens": "input", "tags": "target"}


@row("tagging", {"tokens": TOKENS, "tags": TAGS}, "classification", C - 1, HEAD, TAGGED)
def _(net: Net, batch: Any) -> Tensor:
    scores = net.head(net.mixer(net.table(batch["tokens"]))[0])
    return F.cross_entropy(scores.flatten(0, 1), batch["tags"].flatten())


@row(
    "text classification", {"tokens": TOKENS, "y": Y}, "classification", C - 1, HEAD, {"tokens": "input", "y": "target"}
)
def _(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.head(net.mixer(net.table(batch["tokens"]))[0].mean(1)), batch["y"])


@row("causal language model", {"tokens": TOKENS}, "language model", 0, WORD_HEAD, ONLY_TOKENS)
def _(net: Net, batch: Any) -> Tensor:
    tokens = batch["tokens"]
    return F.cross_entropy(net.words(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@row("causal language model, inputs cut", {"tokens": TOKENS}, "language model", 0, WORD_HEAD, ONLY_TOKENS)
def _(net: Net, batch: Any) -> Tensor:
    tokens = batch["tokens"]
    return F.cross_entropy(net.words(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])


NEXT = {"x": TOKENS, "y": TOKENS.roll(-1, 1)}


@row("causal language model, next tokens beside", NEXT, "language model", 0, WORD_HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.words(batch["x"]).flatten(0, 1), batch["y"].flatten())


WITH_LABELS = {"tokens": TOKENS, "labels": TOKENS.clone()}


@row(
    "causal language model that shifts its labels",
    WITH_LABELS,
    "language model",
    0,
    WORD_HEAD,
    {"tokens": "own target", "labels": "target"},
)
def _(net: Net, batch: Any) -> Tensor:
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    return F.cross_entropy(net.words(batch["tokens"]).flatten(0, 1), labels.flatten(), ignore_index=-100)


@row(
    "masked language model",
    {"tokens": MASKED, "labels": MASKED_LABELS},
    "language model",
    0,
    WORD_HEAD,
    {"tokens": "input", "labels": "target"},
)
def _(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.words(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


@row(
    "ELECTRA",
    {"tokens": MASKED, "labels": MASKED_LABELS},
    "language model",
    0,
    WORD_HEAD,
    {"tokens": "input", "labels": "target"},
)
def _(net: Net, batch: Any) -> Tensor:
    scores = net.words(batch["tokens"])
    sampled = torch.where(batch["labels"] >= 0, scores.argmax(2), batch["tokens"])
    replaced = (batch["labels"] >= 0) & (sampled != batch["labels"])
    found = net.one(net.mixer(net.table(sampled))[0]).squeeze(2)
    generator = F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten())
    return generator + F.binary_cross_entropy_with_logits(found, replaced.float())


SOURCE = torch.randint(1, WORDS, (N, LENGTH))


@row(
    "sequence to sequence",
    {"source": SOURCE, "target": TOKENS},
    "language model",
    0,
    WORD_HEAD,
    {"source": "input", "target": "own target"},
)
def _(net: Net, batch: Any) -> Tensor:
    state = net.mixer(net.table(batch["source"]))[1]
    out = net.vocabulary(net.mixer(net.table(batch["target"][:, :-1]), state)[0])
    return F.cross_entropy(out.flatten(0, 1), batch["target"][:, 1:].flatten())


@row(
    "sequence to sequence, tokens shifted inside",
    {"x": X, "labels": TOKENS},
    "language model",
    0,
    WORD_HEAD,
    {"x": "input", "labels": "own target"},
)
def _(net: Net, batch: Any) -> Tensor:
    before = torch.cat([torch.zeros(N, 1, dtype=torch.long), batch["labels"][:, :-1]], dim=1)
    out = net.vocabulary(net.mixer(net.table(before) + net.features(batch["x"])[:, None])[0])
    return F.cross_entropy(out.flatten(0, 1), batch["labels"].flatten())


@row("CLIP", {"tokens": TOKENS, "x": X}, "self-supervised", 0, set(), {"tokens": "input", "x": "input"})
def _(net: Net, batch: Any) -> Tensor:
    images = F.normalize(net.projector(net.features(batch["x"])), dim=1)
    texts = F.normalize(net.mean(net.mixer(net.table(batch["tokens"]))[0].mean(1)), dim=1)
    scores, places = images @ texts.T / 0.1, torch.arange(N)
    return F.cross_entropy(scores, places) + F.cross_entropy(scores.T, places)


@row(
    "CLIP, scores of a module",
    {"tokens": TOKENS, "x": X},
    "self-supervised",
    0,
    set(),
    {"tokens": "input", "x": "input"},
)
def _(net: Net, batch: Any) -> Tensor:
    texts = net.mean(net.mixer(net.table(batch["tokens"]))[0].mean(1))
    scores, places = net.similarity(net.projector(net.features(batch["x"])), texts), torch.arange(N)
    return F.cross_entropy(scores, places) + F.cross_entropy(scores.T, places)


def _two_views(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0))
    one, two = (net.projector(net.features(x + 0.1 * part)) for part in noise)
    return one, two


@row("joint embedding", {"x": X}, "self-supervised", 0, set(), {"x": "input"})
def _(net: Net, batch: Any) -> Tensor:
    one, two = _two_views(net, batch["x"])
    return F.mse_loss(one, two) + F.relu(1 - one.std(0)).mean()


@row("joint embedding, labels ride along", LABELED, "self-supervised", 0, set(), UNUSED)
def _(net: Net, batch: Any) -> Tensor:
    one, two = _two_views(net, batch["x"])
    return -F.cosine_similarity(one, two).mean()


@row("joint embedding, two views of a loader", [X, X + 0.1], "self-supervised", 0, set(), {"0": "input", "1": "input"})
def _(net: Net, batch: Any) -> Tensor:
    return -F.cosine_similarity(net.features(batch[0]), net.features(batch[1])).mean()


PAIRED, FED = {"x": X, "y": X.roll(1, 1)}, {"x": "input", "y": "input"}


@row("distances of two views, by products", [X, X + 0.1], "self-supervised", 0, set(), {"0": "input", "1": "input"})
def _(net: Net, batch: Any) -> Tensor:
    first, second = (net.features(x) for x in batch)
    return torch.cdist(first, second, compute_mode="use_mm_for_euclid_dist").diag().square().mean()


@row("pairs of towers that end in a sum", PAIRED, "self-supervised", 0, set(), FED)
def _(net: Net, batch: Any) -> Tensor:
    images, texts = (F.normalize(net.residual(part), dim=1) for part in batch.values())
    scores = images @ texts.T / 0.1
    return -F.logsigmoid(scores * (2 * torch.eye(N) - 1)).sum(1).mean()


@row("BYOL", LABELED, "self-supervised", 0, set(), UNUSED)
def _(net: Net, batch: Any) -> Tensor:
    prediction = net.predictor(net.projector(net.features(batch["x"])))
    with torch.no_grad():
        wanted = net.teacher(batch["x"])
    return F.mse_loss(F.normalize(prediction, dim=1), F.normalize(wanted, dim=1))


@row("joint embedding and a probe", LABELED, "self-supervised", 0, {"other"}, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    one, two = _two_views(net, batch["x"])
    probe = F.cross_entropy(net.other(net.features(batch["x"]).detach()), batch["y"])
    return F.mse_loss(one, two) + probe


@row("supervised contrast", LABELED, "self-supervised", 0, set(), UNUSED)
def _(net: Net, batch: Any) -> Tensor:
    features, y = F.normalize(net.projector(net.features(batch["x"])), dim=1), batch["y"]
    same = (y[:, None] == y[None]).float().fill_diagonal_(0)
    scores = (features @ features.T / 0.1).masked_fill(torch.eye(N, dtype=torch.bool), -1e9)
    return -(scores.log_softmax(1) * same).sum(1).div(same.sum(1)).mean()


@row("triplets", LABELED, "self-supervised", 0, set(), UNUSED)
def _(net: Net, batch: Any) -> Tensor:
    features, y = net.projector(net.features(batch["x"])), batch["y"]
    distance, same = torch.cdist(features, features), y[:, None] == y[None]
    far, near = distance.masked_fill(~same, -1).amax(1), distance.masked_fill(same, 1e9).amin(1)
    return (far - near + 1).relu().mean()


ACTED = {"states": X, "actions": Y, "rewards": REAL[:, 0].clone()}
ACTIONS = {"states": "input", "actions": "index", "rewards": "unused"}


@row("DQN", ACTED, "reinforcement", 0, {"head"}, ACTIONS)
def _(net: Net, batch: Any) -> Tensor:
    values = net.scores(batch["states"]).gather(1, batch["actions"][:, None]).squeeze(1)
    with torch.no_grad():
        returns = batch["rewards"] + 0.9 * net.scores(batch["states"] + 1).amax(1)
    return F.smooth_l1_loss(values, returns)


@row("policy gradient", ACTED, "reinforcement", 0, {"head"}, {**ACTIONS, "rewards": "weight"})
def _(net: Net, batch: Any) -> Tensor:
    policy = torch.distributions.Categorical(logits=net.scores(batch["states"]))
    return -(policy.log_prob(batch["actions"]) * batch["rewards"]).mean()


STATES = {"states": X}


def _drawn(net: Net, states: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of actions that the policy draws itself, and what they are worth."""
    with torch.no_grad():
        scores, generator = net.scores(states), torch.Generator().manual_seed(0)
        actions = scores.softmax(1).multinomial(1, generator=generator).squeeze(1)
    policy = torch.distributions.Categorical(logits=net.scores(states))
    return policy.log_prob(actions), torch.randn(N, generator=generator)


@row("policy gradient, actions drawn in the step", STATES, "reinforcement", 0, {"head"}, {"states": "input"})
def _(net: Net, batch: Any) -> Tensor:
    chosen, returns = _drawn(net, batch["states"])
    return -(chosen * (returns - returns.mean())).mean()


@row("actor and critic, actions drawn in the step", STATES, "reinforcement", 0, {"head"}, {"states": "input"})
def _(net: Net, batch: Any) -> Tensor:
    chosen, returns = _drawn(net, batch["states"])
    values = net.one(net.features(batch["states"])).squeeze(1)
    return F.mse_loss(values, returns) - (chosen * (returns - values).detach()).mean()


@row("values of states", STATES, "", 0, set(), {"states": "input"})
def _(net: Net, batch: Any) -> Tensor:
    with torch.no_grad():
        returns = 1 + 0.9 * net.one(net.features(batch["states"] + 1)).squeeze(1)
    return F.mse_loss(net.one(net.features(batch["states"])).squeeze(1), returns)


@row("autoencoder", LABELED, "reconstruction", 0, LAST_OF_DECODER, {"x": "own target", "y": "unused"})
def _(net: Net, batch: Any) -> Tensor:
    return F.mse_loss(net.decoder(net.features(batch["x"])), batch["x"])


@row("VAE whose prior is learned", {"x": X}, "reconstruction", 0, LAST_OF_DECODER, {"x": "own target"})
def _(net: Net, batch: Any) -> Tensor:
    mean, prior = net.features(batch["x"]), net.latent(torch.randn(N, 8))
    divergence = (mean - prior).square().mean()
    return F.mse_loss(net.decoder(mean + torch.randn_like(mean)), batch["x"]) + divergence


@row("VAE", {"x": X}, "reconstruction", 0, LAST_OF_DECODER, {"x": "own target"})
def _(net: Net, batch: Any) -> Tensor:
    features = net.features(batch["x"])
    mean, log_variance = net.mean(features), net.log_variance(features)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    out = net.decoder(net.latent(mean + (0.5 * log_variance).exp() * noise))
    prior = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1).mean()
    return (out - batch["x"]).pow(2).sum(1).mean() + prior


@row("denoising autoencoder", {"x": X}, "reconstruction", 0, LAST_OF_DECODER, {"x": "own target"})
def _(net: Net, batch: Any) -> Tensor:
    noise = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    return F.mse_loss(net.decoder(net.features(batch["x"] + 0.3 * noise)), batch["x"])


@row("denoiser", LABELED, "denoising", 0, LAST_OF_DECODER, UNUSED)
def _(net: Net, batch: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise, level = torch.randn(N, D, generator=generator), torch.rand(N, 1, generator=generator)
    return F.mse_loss(net.decoder(net.features(level * batch["x"] + (1 - level * level).sqrt() * noise)), noise)


@row("GAN", {"x": X}, "", 0, set(), {"x": "input"})
def _(net: Net, batch: Any) -> Tensor:
    noise = torch.randn(N, 16, generator=torch.Generator().manual_seed(0))
    fake, real = net.critic(net.decoder(noise).detach()), net.critic(batch["x"])
    loss = F.binary_cross_entropy_with_logits
    return loss(fake, torch.zeros_like(fake)) + loss(real, torch.ones_like(real))


BOXES = torch.rand(N, C)
DETECTED = {"images": PIXELS, "targets": {"boxes": BOXES, "labels": Y}}
OBJECTS = {"images": "input", "targets.boxes": "target", "targets.labels": "target"}


@row("detection", DETECTED, "classification", 2 * C - 1, {"head", "other"}, OBJECTS)
def _(net: Net, batch: Any) -> Tensor:
    features = net.latent(net.maps(batch["images"]).mean((2, 3)))
    classes = F.cross_entropy(net.head(features), batch["targets"]["labels"])
    return classes + F.smooth_l1_loss(net.other(features), batch["targets"]["boxes"])


PYRAMID = {"images": PIXELS, "boxes": BOXES}
ANCHORED = {"images": "input", "boxes": "unused"}


def _anchors(net: Net, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of two levels, and which of them the step assigns to a box, and its own numbers of them."""
    maps = net.maps(batch["images"])
    scores = torch.cat([net.per_pixel(level).flatten(2) for level in (maps, maps[:, :, ::2, ::2])], dim=2)
    assigned = (torch.arange(scores.numel()).view_as(scores) % 3 == 0).float()
    return scores, assigned, (batch["boxes"][:, :, None] - 0.3).exp().expand_as(scores)


@row("anchors", PYRAMID, "", 0, {"per_pixel"}, ANCHORED)
def _(net: Net, batch: Any) -> Tensor:
    scores, assigned, places = _anchors(net, batch)
    chosen = assigned.bool()
    return F.binary_cross_entropy_with_logits(scores, assigned) + F.l1_loss(scores[chosen], places[chosen] + 0.1)


@row("anchors, areas of boxes", PYRAMID, "", 0, {"per_pixel"}, ANCHORED)
def _(net: Net, batch: Any) -> Tensor:
    scores, assigned, places = _anchors(net, batch)
    sides = scores[:, 1:3].sigmoid()
    area = (sides[:, 0] * sides[:, 1] - 0.1).abs().mean()
    return area + F.binary_cross_entropy_with_logits(scores[:, :1], assigned[:, :1]) + F.l1_loss(scores, places + 0.1)


@row("anchors, focal loss", PYRAMID, "", 0, {"per_pixel"}, ANCHORED)
def _(net: Net, batch: Any) -> Tensor:
    scores, assigned, _ = _anchors(net, batch)
    error = F.binary_cross_entropy_with_logits(scores, assigned, reduction="none")
    sure = scores.sigmoid() * assigned + (1 - scores.sigmoid()) * (1 - assigned)
    return ((0.25 * assigned + 0.75 * (1 - assigned)) * error * (1 - sure) ** 2).mean()


@row("pretext", {"x": X}, "", 0, HEAD, {"x": "input"})
def _(net: Net, batch: Any) -> Tensor:
    strength = torch.arange(N) % C
    return F.cross_entropy(net.scores(batch["x"] * (1 + strength[:, None])), strength)


@row("contrast with keys of a teacher", {"x": X}, "self-supervised", 0, set(), {"x": "input"})
def _(net: Net, batch: Any) -> Tensor:
    with torch.no_grad():
        keys = F.normalize(net.teacher(batch["x"]), dim=1)
    scores = torch.einsum("nd,md->nm", F.normalize(net.projector(net.features(batch["x"])), dim=1), keys)
    return F.cross_entropy(scores / 0.1, torch.arange(N))


@row("segmentation", {"x": PIXELS, "y": REGIONS}, "classification", C - 1, {"per_pixel"}, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.per_pixel(net.maps(batch["x"])), batch["y"])


@row("distillation and labels", LABELED, "classification", C - 1, HEAD, IS_TARGET)
def _(net: Net, batch: Any) -> Tensor:
    scores = net.scores(batch["x"])
    with torch.no_grad():
        wanted = net.teacher(batch["x"])[:, :C].softmax(1)
    return F.cross_entropy(scores, batch["y"]) + F.kl_div(scores.log_softmax(1), wanted, reduction="batchmean")


@row("distillation", LABELED, "self-supervised", 0, set(), UNUSED)
def _(net: Net, batch: Any) -> Tensor:
    with torch.no_grad():
        wanted = net.teacher(batch["x"])[:, :C].softmax(1)
    return F.kl_div(net.scores(batch["x"]).log_softmax(1), wanted, reduction="batchmean")
