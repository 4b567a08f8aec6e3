"""A classifier of sequences by the tokens that they have most of, trained on a first task."""

from functools import cache

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner

from .blocks import Block

VOCABULARY, LENGTH, WIDTH, SIZE, CLASSES = 16, 16, 32, 32, 4


def sequences(shift: int, generator: torch.Generator, step: int, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Tokens ``(N, L)``, and which of four groups of tokens, after a shift, has most of them."""
    labels = torch.randint(CLASSES, (size,), generator=generator)
    tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    own = torch.rand(size, LENGTH, generator=generator) < 0.3
    tokens = torch.where(own, tokens // CLASSES * CLASSES + labels[:, None], tokens)
    return (tokens + shift) % VOCABULARY, labels


class SequenceClassifier(Learner):
    """Two blocks, the mean of tokens, a head."""

    def __init__(self, rate: float = 3e-3) -> None:
        super().__init__(rate)
        self.tokens, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(Block(WIDTH), Block(WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(N, C)``."""
        logits: Tensor = self.head(self.blocks(self.tokens(tokens)).mean(dim=1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@cache
def pretrained(seed: int) -> SequenceClassifier:
    """After 80 steps on the first task."""
    model, generator = SequenceClassifier(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(80):
        optimizer.zero_grad()
        torch.autograd.backward(model.training_step(sequences(0, generator, step), step))
        optimizer.step()
    return model
