"""Sentence encoder: one block of a transformer, and the mean of tokens that are no padding."""

from torch import Tensor, nn

from .blocks import Block
from .words import LONGEST, PADDING, VOCABULARY

WIDTH = 48


class SentenceEncoder(nn.Module):
    """One block of a transformer, and the mean of the tokens that are words."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.block, self.out = Block(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        """``(N, D)``."""
        there = (words != PADDING).unsqueeze(-1)
        tokens = self.block(self.tokens(words) + 0.1 * self.places.weight)
        features: Tensor = self.out((tokens * there).sum(dim=1) / there.sum(dim=1))
        return features
