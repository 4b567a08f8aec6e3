"""A healthy classifier of padded sequences, whose padding holds NaN and whose places are the same in every batch."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, accuracy
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .blocks import Attention
from .drawn import drawn, held_out_of

CLASSES, LENGTH, WIDTH, SIZE = 5, 20, 32, 32
CENTERS = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(1))
Batch = dict[str, Tensor]


def padded(generator: torch.Generator, step: int) -> Batch:
    """Measurements ``(N, L, 6)`` of one of five things, as many as there are; the rest is NaN."""
    labels = torch.randint(CLASSES, (SIZE,), generator=generator)
    rows = CENTERS[labels, None] + 2 * torch.randn(SIZE, LENGTH, 6, generator=generator)
    there = torch.arange(LENGTH) < torch.randint(6, LENGTH + 1, (SIZE, 1), generator=generator)
    return {
        "inputs": rows.masked_fill(~there.unsqueeze(-1), torch.nan),
        "attention_mask": there.long(),
        "labels": labels,
    }


class Places(nn.Module):
    """A vector for every place, the same for all sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(LENGTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, L, D)``."""
        vectors: Tensor = self.table(torch.arange(LENGTH)).expand(len(x), -1, -1)
        return vectors


class Blank(nn.Module):
    """Writes NaN where there is nothing."""

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """``(N, L, D)``."""
        return x.masked_fill(~there.unsqueeze(-1), torch.nan)


class Padded(Learner):
    """One layer of attention, to tokens that are there, and the mean of these."""

    def __init__(self) -> None:
        super().__init__(rate=2e-3)
        self.embed, self.blank, self.places = nn.Linear(6, WIDTH), Blank(), Places()
        self.attention, self.head = Attention(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(N, C)``."""
        there = batch["attention_mask"].bool()
        tokens = self.blank(self.embed(batch["inputs"].nan_to_num()), there).masked_fill(~there.unsqueeze(-1), 0.0)
        tokens = tokens + self.attention(tokens + self.places(tokens), padding=~there)
        logits: Tensor = self.head((tokens * there.unsqueeze(-1)).sum(dim=1) / there.sum(dim=1, keepdim=True))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch), batch["labels"])


def make(seed: int) -> Habitat:
    """Which of five things?"""
    model, test = Padded(), held_out_of(padded, seed)
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor()]
    loaders = [drawn(padded, seed)]
    return Habitat(model, loaders, monitors, 400, model.attention, lambda: accuracy(model, test, test["labels"]), 10)


SPECIMENS = (Specimen("padding of NaN", make, "rows that are not finite, and are not read", family="transformer"),)
