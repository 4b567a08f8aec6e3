"""Captions of digits, and two towers that embed images and captions."""

import torch
from torch import Tensor, nn

from examples.zoo.material import mlp

from .blocks import Block

WORDS = [
    "a",
    "the",
    "photo",
    "picture",
    "of",
    "digit",
    "number",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
]
TEMPLATES = ("a photo of the {}", "the picture of a {}", "a digit the number {}", "photo of the digit {}")
WIDTH = 32


def captions() -> Tensor:
    """Words of every template for every digit, ``(4, 10, 5)``."""
    texts = [[template.format(WORDS[7 + digit]).split() for digit in range(10)] for template in TEMPLATES]
    return torch.tensor([[[WORDS.index(word) for word in words] for words in row] for row in texts])


class TwoTowers(nn.Module):
    """A convolutional network for images, a transformer for captions, and a projection of each."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
        )
        self.tokens, self.places = nn.Embedding(len(WORDS), WIDTH), nn.Embedding(5, WIDTH)
        self.text = nn.Sequential(Block(WIDTH), nn.LayerNorm(WIDTH))
        self.image_projection, self.text_projection = mlp(512, 64, WIDTH), nn.Linear(WIDTH, WIDTH)

    def images(self, pixels: Tensor) -> Tensor:
        """``(N, D)``."""
        return nn.functional.normalize(self.image_projection(self.vision(pixels)), dim=1)

    def texts(self, words: Tensor) -> Tensor:
        """``(N, D)``."""
        tokens = self.text(self.tokens(words) + self.places.weight)
        return nn.functional.normalize(self.text_projection(tokens.mean(dim=1)), dim=1)
