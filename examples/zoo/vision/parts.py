"""Images, convolutional networks and outcomes that the specimens of this folder share."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from examples.zoo.material import Learner, digits, loader, neighbour_accuracy
from examples.zoo.specimen import Habitat
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor
from lightning_collapse.demo import augment

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digit_images(seed: int) -> Data:
    """Handwritten digits ``(N, 1, 8, 8)`` and labels to train on, then 360 of each held out."""
    images, labels, test, classes = digits(seed)
    return images.view(-1, 1, 8, 8), labels, test.view(-1, 1, 8, 8), classes


@cache
def patches(seed: int, size: int = 16, count: int = 2000) -> tuple[Tensor, Tensor]:
    """Patches ``(N, 3, S, S)`` of two photographs around 0 to train on, and 400 of their right quarters held out."""
    generator = torch.Generator().manual_seed(seed)
    photographs = [torch.tensor(pixels).permute(2, 0, 1).float() / 128 - 1 for pixels in load_sample_images().images]

    def cut(total: int, left: int, right: int) -> Tensor:
        rows = torch.randint(photographs[0].shape[1] - size, (total,), generator=generator).tolist()
        columns = torch.randint(left, right - size, (total,), generator=generator).tolist()
        corners = enumerate(zip(rows, columns, strict=True))
        return torch.stack([photographs[i % 2][:, y : y + size, x : x + size] for i, (y, x) in corners])

    width = photographs[0].shape[2]
    return cut(count, 0, width * 3 // 4), cut(400, width * 3 // 4, width)


def block(inputs: int, outputs: int, stride: int = 1, norm: str = "batch") -> nn.Sequential:
    """A convolution, a normalization (``batch``, ``group`` or ``none``) and a ReLU."""
    norms = {"batch": nn.BatchNorm2d(outputs), "group": nn.GroupNorm(4, outputs), "none": nn.Identity()}
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), norms[norm], nn.ReLU())


def conv_net(channels: int = 1, width: int = 16, norm: str = "batch", outputs: int | None = None) -> nn.Sequential:
    """Three blocks that halve the image twice, the mean over places and, with ``outputs``, a linear layer."""
    blocks = [block(channels, width, 1, norm), block(width, 2 * width, 2, norm), block(2 * width, 4 * width, 2, norm)]
    head = [] if outputs is None else [nn.Linear(4 * width, outputs)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def projector(*widths: int, last_norm: bool = False) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU in between, and BatchNorm behind the last if wanted."""
    layers: list[nn.Module] = []
    for before, width in pairwise(widths):
        layers += [nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers[:-1]) if last_norm else nn.Sequential(*layers[:-2])


def two_views(images: Tensor) -> tuple[Tensor, Tensor]:
    """Two views of each image: turned, zoomed, shifted, with noise."""
    return augment(images), augment(images)


def fixed_views(images: Tensor) -> tuple[Tensor, Tensor]:
    """The same two views at every call, without a trace in the generator of the training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return two_views(images)


def recall(encoder: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """How often the nearest embedding (by cosine) of a view is that of the other view of the same image."""
    first, second = (nn.functional.normalize(encoder(view), dim=1) for view in fixed_views(images))
    return float(((first @ second.T).argmax(dim=1) == torch.arange(len(images))).double().mean())


def usage(scores: Tensor) -> float:
    """Share of the columns in use: the perplexity of how often each has the highest score, over their number."""
    share = scores.argmax(dim=1).bincount(minlength=scores.shape[1]) / len(scores)
    return float(torch.special.entr(share).sum().exp()) / scores.shape[1]


def probe(encoder: Callable[[Tensor], Tensor], data: Data) -> float:
    """Accuracy of a ridge classifier on frozen features, fitted to 600 training images and read on held-out ones."""
    images, labels, test, classes = data
    features, unseen = encoder(images[:600]).double(), encoder(test).double()
    mean, scale = features.mean(dim=0), features.std().clamp_min(1e-12)
    features, unseen = (features - mean) / scale, (unseen - mean) / scale
    targets = nn.functional.one_hot(labels[:600]).double() - 0.1
    gram = features.T @ features + 0.1 * torch.eye(features.shape[1]).double()
    return float(((unseen @ torch.linalg.solve(gram, features.T @ targets)).argmax(dim=1) == classes).double().mean())


def self_supervised(
    model: Learner,
    seed: int,
    embedding: nn.Module,
    outcome: Callable[[Any], float] | None = None,
    steps: int = 400,
    every: int = 10,
    size: int = 64,
    monitors: tuple[Callback, ...] = (),
) -> Habitat:
    """Digits without labels for a model with an ``encoder``."""
    data = digit_images(seed)
    return Habitat(
        model,
        [loader(data[0], size=size, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), *monitors],
        steps=steps,
        embedding=embedding,
        held_out=lambda: neighbour_accuracy(model.encoder, data),  # type: ignore[arg-type]
        every=every,
        outcome=outcome,
    )
