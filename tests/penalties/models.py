"""Small models of every kind, with data, and the obvious way to their Fisher information."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

WIDTH, CLASSES, TOKENS, VOCABULARY = 6, 4, 5, 11


class Convolutions(nn.Module):
    """Groups, stride, dilation, reflected borders, batch and group normalization, in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2), groups=2)
        self.group = nn.GroupNorm(3, 6)
        self.third = nn.Conv2d(6, 6, 3, padding="same", groups=6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        return self.head(self.relu(self.third(self.group(self.second(x)))).mean(dim=(2, 3)))


class Lines(nn.Module):
    """Convolutions in one and three dimensions; the second one runs on frames, as many per sample as there are."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(2, 3, 3, stride=2)
        self.norm = nn.BatchNorm1d(3)
        self.frame = nn.Conv2d(1, 3, 2)
        self.volume = nn.Conv3d(1, 2, 2, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        line = self.norm(self.line(x.flatten(2))).mean(dim=2)
        frame = self.frame(x.flatten(0, 1).unsqueeze(1)).mean(dim=(2, 3)).view(len(x), 2, -1).tanh().sum(dim=1)
        volume = self.volume(x.unsqueeze(1)).relu().mean(dim=(2, 3, 4))
        return self.head(torch.cat([line, frame, volume], dim=1))


class Attention(nn.Module):
    """A transformer with positions that are looked up once for all samples."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.position = nn.Embedding(TOKENS, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.head = nn.Linear(8, CLASSES)
        self.batch_first = batch_first

    def forward(self, x):
        x = self.embed(x) + self.position(torch.arange(TOKENS, device=x.device))
        x = self.block(x if self.batch_first else x.transpose(0, 1))
        return self.head(x[:, 0] if self.batch_first else x[0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 5, batch_first=True, num_layers=2, dropout=0.5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Shared(nn.Module):
    """A layer called twice, a tied weight, a raw parameter, a parametrized weight, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.tied.weight
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.unused = nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.twice(self.twice(x).tanh()) * self.scale
        x = self.norm(self.other(self.tied(x).tanh()))
        return self.head(self.normed(x).tanh())


class Tokens(nn.Module):
    """Logits of every position: a sample is a sequence."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.hidden(x).tanh().cumsum(dim=1))


def perceptron():
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))


def tokens(samples):
    return torch.randint(VOCABULARY, (samples, TOKENS))


CASES = {
    "perceptron": (perceptron, lambda n: torch.randn(n, WIDTH)),
    "convolutions": (Convolutions, lambda n: torch.randn(n, 2, 7, 8)),
    "lines": (Lines, lambda n: torch.randn(n, 2, 5, 4)),
    "attention": (Attention, tokens),
    "attention, tokens first": (lambda: Attention(batch_first=False), tokens),
    "recurrent": (Recurrent, lambda n: torch.randn(n, TOKENS, WIDTH)),
    "shared": (Shared, lambda n: torch.randn(n, WIDTH)),
}


def case(name, samples=9, dtype=torch.float64):
    """A model with statistics of its own, in train mode, and data ``(x, y)``."""
    torch.manual_seed(0)
    make, data = CASES[name]
    model = make().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = data(samples)
    return model, (x.to(dtype) if x.is_floating_point() else x, torch.randint(CLASSES, (samples,)))


def batched(data, size):
    """Batches of pairs."""
    return list(zip(*(part.split(size) for part in data), strict=True))


def by_loop(model, data, losses, power=torch.square):
    """Mean over samples of the sum over ``losses(outputs, label)`` of a power of the gradient, one by one."""
    model.eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in named.items()}
    for x, y in batched(data, 1):
        for loss in losses(functional_call(model, named, (x,)), y):
            found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    totals[name] += power(gradient.detach())
    model.train()
    return {name: total / len(data[1]) for name, total in totals.items()}


def exact_losses(z, y):
    p = z.detach().softmax(dim=1)
    return [p[0, c].sqrt() * cross_entropy(z, torch.tensor([c])) for c in range(z.shape[1])]
