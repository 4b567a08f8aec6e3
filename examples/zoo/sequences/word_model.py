"""A made language in which two words say which one is likely next, and a causal transformer that learns it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner
from examples.zoo.specimen import Habitat
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .blocks import Block
from .drawn import drawn, held_out_of

VOCABULARY, WIDTH, LENGTH, SIZE, STEPS, ONSET, WARM_UP = 40, 48, 16, 16, 600, 300, 30
NEXT = torch.randint(VOCABULARY, (VOCABULARY, 2), generator=torch.Generator().manual_seed(0))


def passages(bad: bool, generator: torch.Generator, step: int) -> Tensor:
    """Passages ``(N, L + 1)`` of a made language; with ``bad``, from a step on always the same one of noise."""
    if bad and step >= ONSET:
        return torch.randint(VOCABULARY, (SIZE, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    words = [torch.randint(VOCABULARY, (SIZE,), generator=generator) for _ in range(2)]
    for _ in range(LENGTH - 1):
        likely = NEXT[words[-1], words[-2] % 2]
        other = torch.randint(VOCABULARY, (SIZE,), generator=generator)
        words.append(torch.where(torch.rand(SIZE, generator=generator) < 0.85, likely, other))
    return torch.stack(words, dim=1)


class WordModel(Learner):
    """Next word; the head is the table of embeddings; with ``rounds``, from a step on weights are rounded downwards."""

    def __init__(self, schedule: Callable[[int], float], rounds: bool) -> None:
        super().__init__(rate=4e-3, decay=0.01, schedule=schedule)
        self.rounds = rounds
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, causal=True) for _ in range(2)))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.1)

    def forward(self, words: Tensor) -> Tensor:
        """Logits ``(N, L, V)``."""
        logits: Tensor = self.norm(self.blocks(self.tokens(words) + self.places.weight)) @ self.tokens.weight.T
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Weights have the three bits of an E4M3 number behind the leading one."""
        if self.rounds and self.global_step >= ONSET:
            for parameter in self.parameters():
                mantissa, exponent = torch.frexp(parameter)
                parameter.copy_(torch.ldexp((mantissa * 16).floor() / 16, exponent))


def language_model(seed: int, factor: Callable[[int], float], bad: bool = False, rounds: bool = False) -> Habitat:
    """A language in which two words say which one is next; ``factor`` is that of the learning rate."""
    model = WordModel(factor, rounds)
    held_out = torch.cat([held_out_of(partial(passages, False), 10 * seed + i) for i in range(8)])

    def score() -> float:
        return float((model(held_out[:, :-1]).argmax(dim=-1) == held_out[:, 1:]).double().mean())

    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor()]
    return Habitat(model, [drawn(partial(passages, bad), seed)], monitors, STEPS, model.norm, score, every=10)
