"""A small vision transformer."""

import torch
from torch import Tensor, nn


class Transformer(nn.Module):
    """Embeds patches of an image, adds places, and takes the mean of what blocks make of them.

    Args:
        patch: Height and width of a patch.
        length: Patches of an image.
        width: Features.
        depth: Blocks.
    """

    def __init__(self, patch: tuple[int, int], length: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )

    def forward(self, images: Tensor) -> Tensor:
        """From ``(N, 1, H, W)`` to ``(N, D)``."""
        tokens: Tensor = self.embed(images).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.mean(dim=1)
