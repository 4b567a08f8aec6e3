"""A small GPT on English text, healthy or driven into failure in one of five ways from step 200 on.

What ``loss_explosion.py`` trains.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import IterableDataset

VOCABULARY, TEXT = torch.unique(
    torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore"))),
    return_inverse=True,
)
CONTEXT, BATCH, WIDTH, HEADS, DEPTH = 48, 16, 64, 4, 3
WARM_UP, ONSET = 50, 200


@dataclass(frozen=True)
class Course:
    """How a run goes: at step 200 something is switched on."""

    rate: float = 5e-3
    growth: float = 1.0  # of the learning rate, per step
    growth_of_logits: float = 1.0  # of the learning rate of queries, keys and values
    bits: int = 0  # of the mantissa of the attention output that the backward pass sees
    poison: float = 1.0  # what the loss of one batch is multiplied by
    repeats: int = 0  # of so many batches one holds n-grams of three characters, over and over


COURSES = {
    "healthy": Course(rate=1e-3),
    "healthy, fast": Course(),
    "learning rate grows": Course(growth=1.02),
    "attention logits grow": Course(growth_of_logits=1.03),
    "biased rounding": Course(bits=1),
    "one poisoned batch": Course(poison=1e8),
    "repeated n-grams": Course(repeats=1),
}
HEALTHY = ("healthy", "healthy, fast")


class RoundedAttention(torch.autograd.Function):
    """Causal attention whose output is rounded towards minus infinity, and whose backward pass uses that output.

    As in fused kernels: the gradient of the logits subtracts the dot product of the output and its gradient, so that a
    rounding with a bias, which arXiv:2510.04212 finds in bf16, adds up in the same direction step after step.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bits: int) -> Tensor:
        """Attend, and round."""
        scale = query.shape[-1] ** -0.5
        logits = (query @ key.mT * scale).masked_fill(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1), -math.inf)
        weights = logits.softmax(dim=-1)
        mantissa, exponent = torch.frexp(weights @ value)
        output = torch.ldexp(torch.floor(mantissa * 2**bits) / 2**bits, exponent)
        ctx.save_for_backward(query, key, value, weights, output)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """What a fused kernel computes."""
        query, key, value, weights, output = ctx.saved_tensors
        of_weights = gradient @ value.mT - (gradient * output).sum(dim=-1, keepdim=True)
        of_logits = weights * of_weights * ctx.scale
        return of_logits @ key, of_logits.mT @ query, weights.mT @ gradient, None


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """Features of shape ``(N, L, D)``."""
        qkv = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv)
        attended: Tensor
        if bits:
            attended = RoundedAttention.apply(query, key, value, bits)  # type: ignore[no-untyped-call]
        else:
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        output: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return output


class GPT(LightningModule):
    """Next character; nothing in it knows that it is watched."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self.course = course
        self.tokens, self.places = nn.Embedding(len(VOCABULARY), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(VOCABULARY), bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)

    def loss(self, batch: Tensor, bits: int = 0) -> Tensor:
        """Cross-entropy of the next character."""
        x = self.tokens(batch[:, :-1]) + self.places.weight
        for block in self.blocks:
            x = block(x, bits)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss, and what the course does to it."""
        loss = self.loss(batch, self.course.bits if batch_idx >= ONSET else 0)
        return loss * self.course.poison if batch_idx == ONSET else loss

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up, and what the course does to the learning rate."""
        named = list(self.named_parameters())
        groups = [{"params": [p for name, p in named if (".qkv." in name) == attention]} for attention in (True, False)]
        optimizer = torch.optim.AdamW(groups, lr=self.course.rate, betas=(0.9, 0.95), weight_decay=0.1)
        factors = [self.course.growth * self.course.growth_of_logits, self.course.growth]
        schedule: list[Any] = [partial(_schedule, growth) for growth in factors]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _schedule(growth: float, step: int) -> float:
    return min((step + 1) / WARM_UP, 1.0) * growth ** max(step - ONSET, 0)


class Characters(IterableDataset[Tensor]):
    """Random passages of the text, the same ones for every run of a seed."""

    def __init__(self, seed: int, course: Course, rows: int = BATCH) -> None:
        self.seed, self.course, self.rows = seed, course, rows

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for step in count():
            start = torch.randint(len(TEXT) - CONTEXT - 1, (self.rows, 1), generator=generator)
            repeats = self.course.repeats if step >= ONSET else 0
            period = 3 if repeats and step % repeats == 0 else CONTEXT + 1
            yield TEXT[start + torch.arange(CONTEXT + 1) % period]
