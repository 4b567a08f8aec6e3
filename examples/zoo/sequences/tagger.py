"""A tagger of random sentences: what a token is called depends on the token before it."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner
from examples.zoo.specimen import Habitat
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor, TokenMonitor

from .blocks import Block
from .drawn import drawn, held_out_of

VOCABULARY, LENGTH, TAGS, WIDTH, DEPTH, STEPS = 12, 16, 4, 32, 6, 400
TABLE = torch.randint(TAGS, (VOCABULARY, 2), generator=torch.Generator().manual_seed(0))


def sentences(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
    """Tokens ``(N, L)`` and their tags, which depend on the token and on whether the one before it is even."""
    tokens = torch.randint(VOCABULARY, (16, LENGTH), generator=generator)
    return tokens, TABLE[tokens, tokens.roll(1, dims=1) % 2]


class Tagger(Learner):
    """A transformer and a head for every token; places follow each other in a circle."""

    def __init__(self, depth: int = DEPTH, rate: float = 2e-3, decay: float = 0.0, **block: Any) -> None:
        super().__init__(rate, decay)
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, **block) for _ in range(depth)))
        self.head = nn.Linear(WIDTH, TAGS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(N, L, C)``."""
        logits: Tensor = self.head(self.blocks(self.tokens(tokens) + self.places.weight))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        tokens, tags = batch
        return nn.functional.cross_entropy(self(tokens).flatten(0, 1), tags.flatten())


def tagging(seed: int, model: Tagger, steps: int = STEPS) -> Habitat:
    """Tags of random sentences."""
    tokens, tags = held_out_of(sentences, seed)
    return Habitat(
        model,
        [drawn(sentences, seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor(), TokenMonitor()],
        steps=steps,
        every=10,
        embedding=model.blocks,
        held_out=lambda: float((model(tokens).argmax(dim=-1) == tags).double().mean()),
    )
