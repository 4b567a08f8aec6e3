"""Healthy transformers whose attention looks dangerous: sharp heads, uniform heads, tasks that change."""

import torch
from torch import Tensor

from examples.zoo.specimen import Habitat, Specimen

from .transformer import LENGTH, SIZE, VOCABULARY, Transformer, by_token


def _tokens(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (SIZE, length), generator=generator)


def previous_token(seed: int) -> Habitat:
    """The target is the token before: heads look at one place, and all is right."""

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        tokens = _tokens(generator)
        targets = tokens.roll(1, dims=1)
        targets[:, 0] = -100
        return tokens, targets

    return by_token(seed, Transformer(VOCABULARY, rate=5e-3), draw)


def counting(seed: int) -> Habitat:
    """How many tokens so far were below six? Attention to all alike is right."""

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        tokens = _tokens(generator)
        return tokens, (tokens < VOCABULARY // 2).long().cumsum(dim=1)

    return by_token(seed, Transformer(LENGTH + 1), draw, steps=600)


def curriculum(seed: int) -> Habitat:
    """Running parity of longer and longer sequences: the loss jumps with every lesson."""

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        length = LENGTH if step == 0 else 4 * (1 + min(step // 120, 3))
        tokens = _tokens(generator, length)
        return tokens, tokens.cummax(dim=1).values

    return by_token(seed, Transformer(VOCABULARY, causal=True), draw, steps=500)


def reversal(seed: int) -> Habitat:
    """A sequence, a mark, and the sequence again from its end, in one decoder."""

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        tokens = _tokens(generator, 8)
        row = torch.cat([tokens, torch.full((SIZE, 1), VOCABULARY), tokens.flip(1)], dim=1)
        targets = row[:, 1:].clone()
        targets[:, :8] = -100
        return row[:, :-1], targets

    return by_token(seed, Transformer(VOCABULARY, rate=5e-3), draw, steps=600)


SPECIMENS = (
    Specimen(
        "previous token", previous_token, "heads look at one token, and every answer is right", family="transformer"
    ),
    Specimen("counting", counting, "heads look at all tokens alike, as the task asks", family="transformer"),
    Specimen(
        "longer sequences later", curriculum, "the loss jumps whenever sequences get longer", family="transformer"
    ),
    Specimen("reversal", reversal, "sequence to sequence, targets in one half", family="transformer"),
)
