"""Data that ships with a dependency, and the parts that specimens share."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_collapse.demo import augment

HELD_OUT, CONTEXT = 360, 32


class Batches(IterableDataset[tuple[Tensor, ...]]):
    """Shuffled epochs of whole batches without end, the same ones for every run of a seed."""

    def __init__(self, tensors: tuple[Tensor, ...], size: int, seed: int) -> None:
        self.tensors, self.size, self.seed = tensors, size, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.tensors[0]), generator=generator)
            for rows in order[: len(order) - len(order) % self.size].view(-1, self.size):
                yield tuple(tensor[rows] for tensor in self.tensors)


class Passages(IterableDataset[Tensor]):
    """Random passages of English text, ``(N, L + 1)`` characters."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        text = characters()[1]
        while True:
            start = torch.randint(len(text) - CONTEXT - 1, (self.size, 1), generator=generator)
            yield text[start + torch.arange(CONTEXT + 1)]


def loader(*tensors: Tensor, size: int, seed: int) -> DataLoader[Any]:
    """Random batches ``size`` at a time."""
    return DataLoader(Batches(tensors, size, seed), batch_size=None)


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits ``(N, 64)`` between 0 and 1 and labels to train on, then 360 of each held out."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].float() / 16, labels[order]
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def diabetes(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three standardized measures of patients and eight others to predict them from; then those of 88 held out."""
    measured, progression = load_diabetes(return_X_y=True, scaled=False)
    table = torch.cat([torch.tensor(progression).unsqueeze(1), torch.tensor(measured)], dim=1)
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))]
    table = ((table - table[88:].mean(dim=0)) / table[88:].std(dim=0, correction=0)).float()
    inputs, targets = table[:, [1, 2, 5, 6, 7, 8, 9, 10]], table[:, [0, 3, 4]]
    return inputs[88:], targets[88:], inputs[:88], targets[:88]


@cache
def characters() -> tuple[Tensor, Tensor]:
    """The vocabulary and the text, in its numbers."""
    raw = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    vocabulary, text = torch.unique(torch.tensor(list(raw)), return_inverse=True)
    return vocabulary, text


def view(images: Tensor) -> Tensor:
    """Another view of flat images: turned, zoomed, shifted, with noise."""
    return augment(images.view(-1, 1, 8, 8)).flatten(1)


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    """Linear layers with a ReLU in between, and BatchNorm before it."""
    layers: list[nn.Module] = []
    for before, width in pairwise(widths):
        layers += [nn.Linear(before, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[: -2 if norm else -1])


class Learner(LightningModule):
    """What every specimen's module shares: the optimizer.

    Args:
        rate: The learning rate.
        decay: Weight decay.
        momentum: Of SGD; ``None`` for AdamW.
        schedule: Factor of the rate by step.
    """

    def __init__(
        self,
        rate: float,
        decay: float = 0.0,
        momentum: float | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__()
        self.rate, self.decay, self.momentum, self.schedule = rate, decay, momentum, schedule

    def configure_optimizers(self) -> Any:
        """AdamW or SGD."""
        optimizer: torch.optim.Optimizer
        if self.momentum is None:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=self.decay)
        else:
            optimizer = torch.optim.SGD(self.parameters(), self.rate, self.momentum, weight_decay=self.decay)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Classifier(Learner):
    """A body, a head and cross-entropy."""

    def __init__(self, body: nn.Module, head: nn.Module, rate: float = 2e-3, **optimizer: Any) -> None:
        super().__init__(rate, **optimizer)
        self.body, self.head = body, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.body(images))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right classes."""
    return float((model(images).argmax(dim=1) == labels).double().mean())


def explained(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Share of the targets' variance that predictions explain."""
    error = (model(inputs) - targets).square().mean()
    return float(1 - error / targets.var(dim=0, correction=0).mean())


def neighbour_accuracy(encoder: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """How often a held-out image has the class of the nearest of 300 others, by features."""
    images, labels, test, classes = data
    nearest = torch.cdist(encoder(test), encoder(images[:300])).argmin(dim=1)
    return float((labels[nearest] == classes).double().mean())


def warm_up(steps: int) -> Callable[[int], float]:
    """A linear warm-up of the learning rate, then constant."""
    return lambda step: min((step + 1) / steps, 1.0)


def cool_down(steps: int) -> Callable[[int], float]:
    """A learning rate that falls linearly to zero."""
    return lambda step: max(1 - step / steps, 0.0)
