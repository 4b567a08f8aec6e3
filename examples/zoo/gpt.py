"""A small GPT on English text, the module of the specimens of attention and of exploding losses."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .material import CONTEXT, Passages, accuracy, characters
from .specimen import Habitat

WIDTH, HEADS, DEPTH, WARM_UP = 32, 4, 2, 20


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape ``(N, L, D)``."""
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        output: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return output


class GPT(LightningModule):
    """Next character.

    Args:
        rate: The learning rate after the warm-up.
        growth: Its growth per step from a step on.
        growth_of_logits: The same, of queries, keys and values only.
        onset: The step from which it grows.
    """

    def __init__(self, rate: float, growth: float, growth_of_logits: float, onset: int) -> None:
        super().__init__()
        self.rate, self.growth, self.growth_of_logits, self.onset = rate, growth, growth_of_logits, onset
        vocabulary = len(characters()[0])
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.08)

    def forward(self, text: Tensor) -> Tensor:
        """Logits ``(N, V, L)`` of the characters after those of ``(N, L)``."""
        features = self.blocks(self.tokens(text) + self.places.weight)
        logits: Tensor = self.head(self.norm(features)).mT
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[:, :-1]), batch[:, 1:])

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up."""
        named = list(self.named_parameters())
        groups = [{"params": [p for name, p in named if (".qkv." in name) == attention]} for attention in (True, False)]
        optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.1)
        growths = (self.growth * self.growth_of_logits, self.growth)
        schedules: list[Any] = [partial(_schedule, growth, self.onset) for growth in growths]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _schedule(growth: float, onset: int, step: int) -> float:
    return min((step + 1) / WARM_UP, 1.0) * growth ** max(step - onset, 0)


def gpt(seed: int, growth: float = 1.0, growth_of_logits: float = 1.0, rate: float = 3e-3, onset: int = 90) -> Habitat:
    """English text, character by character."""
    model = GPT(rate, growth, growth_of_logits, onset)
    held_out = next(iter(Passages(32, seed=1000 + seed)))
    return Habitat(
        model,
        [DataLoader(Passages(8, seed), batch_size=None)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor()],
        steps=200,
        every=4,
        embedding=model.norm,
        held_out=lambda: accuracy(model, held_out[:, :-1], held_out[:, 1:]),
    )
