"""What the battery of ``tests/contracts/test_layers.py`` converts: one line per registered layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_collapse.layers import VectorQuantizer

WORDS, WIDTH = 11, 8


class Tokens(nn.Module):
    """An encoder of two blocks whose head is tied to its table of words."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)
        self.checkpointing = False
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5)
        self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words)
        for block in self.encoder.layers:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x)


class Block(nn.Module):
    """One written out: torch's own leave parts of theirs out in evaluation."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x):
        normed = self.norm(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(x)


class Written(Tokens):
    """The same with these blocks."""

    def __init__(self):
        super().__init__()
        self.encoder.layers = nn.ModuleList([Block(), Block()])


class Quantizing(Block):
    """One that adds codes of its tokens to them, and the loss that moves these."""

    def __init__(self):
        super().__init__()
        self.quantizer = VectorQuantizer(16, WIDTH)
        nn.init.normal_(self.quantizer.codebook.weight)

    def forward(self, x):
        x = super().forward(x)
        quantized, _, loss = self.quantizer(x)
        return x + quantized + loss


class Coded(Tokens):
    """The same with these blocks."""

    def __init__(self):
        super().__init__()
        self.encoder.layers = nn.ModuleList([Quantizing(), Quantizing()])


@dataclass(frozen=True)
class Case:
    """How a layer is put to the test.

    Attributes:
        options: With which ``convert_`` keeps what the model computes.
        folds: Whether plain modules can do what converted ones have learned.
        model: Makes the model; its weights depend on torch's seed.
        inputs: What it is called with.
    """

    options: dict[str, Any] = field(default_factory=dict)
    folds: bool = True
    model: Callable[[], nn.Module] = Tokens
    inputs: Callable[[], torch.Tensor] = lambda: torch.randint(
        WORDS, (3, 5), generator=torch.Generator().manual_seed(1)
    )


CASES = {
    "AttentionTemperature": Case({"learn": True}),
    "AugmentedBranch": Case({"branches": ["*.attn", "*.mlp"], "dim": WIDTH}, folds=False, model=Written),
    "LayerScale": Case(),
    "ReZero": Case({"blocks": ["*layers.?"]}),
    "SeriesActivation": Case(folds=False, model=Written),
    "SigmaReparam": Case(),
    "SimVQ": Case(model=Coded),
}
