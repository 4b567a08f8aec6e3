"""A small transformer that has a target for every token."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner
from examples.zoo.specimen import Habitat
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .blocks import Block
from .drawn import Draw, drawn, held_out_of

VOCABULARY, LENGTH, WIDTH, SIZE = 12, 16, 32, 16


class Transformer(Learner):
    """A token for every token: a table, places, blocks and a head.

    Args:
        outputs: Classes of a token.
        blocks: How many.
        causal: Whether a token sees only those before it.
        optimizer: See :class:`Learner`.
    """

    def __init__(self, outputs: int, blocks: int = 2, causal: bool = True, **optimizer: Any) -> None:
        super().__init__(**{"rate": 3e-3, **optimizer})
        self.tokens, self.places = nn.Embedding(VOCABULARY + 1, WIDTH), nn.Embedding(2 * LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, causal=causal) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(N, L, C)``."""
        features = self.blocks(self.tokens(tokens) + self.places(torch.arange(tokens.shape[1])))
        logits: Tensor = self.head(self.norm(features))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy; -100 is no target."""
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())


def by_token(seed: int, model: Transformer, draw: Draw, steps: int = 400, **settings: Any) -> Habitat:
    """Watch a transformer that has a target for every token."""
    tokens, targets = held_out_of(draw, seed)

    def right() -> float:
        there = targets != -100
        return float((model(tokens).argmax(dim=-1) == targets)[there].double().mean())

    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor()]
    return Habitat(model, [drawn(draw, seed)], monitors, steps, model.norm, right, **{"every": 10, **settings})
