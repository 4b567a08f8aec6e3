"""Does sigma-reparametrization train a small GPT where the plain one diverges: no warm-up, with and without norms?

Characters of Python's own documentation, Adam at a constant rate from the first step, three seeds. Prints a table; the
figures are in ``tokens_and_depth.md``.

Run: ``python examples/depth/sigma_reparam.py [--quick]``, 3 minutes on one core.
"""

import argparse
from itertools import product
from math import inf
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_collapse.layers import SigmaReparam

VOCABULARY, TEXT = torch.unique(
    torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore"))),
    return_inverse=True,
)
CONTEXT, BATCH, WIDTH, HEADS, DEPTH = 48, 16, 64, 4, 4
RATES = (1e-2, 3e-2)
DIVERGED = 1.2
"""A run has diverged once it ends this many times above the entropy of single characters."""


class Block(nn.Module):
    """Attention and a feed-forward network, before each a norm or nothing."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(WIDTH) if norms else nn.Identity() for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(N, L, D)``."""
        parts = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        total: Tensor = x + self.mlp(self.norm_2(x))
        return total


class GPT(nn.Module):
    """A language model of characters."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(len(VOCABULARY), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(norms) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH) if norms else nn.Identity()
        self.head = nn.Linear(WIDTH, len(VOCABULARY))

    def forward(self, text: Tensor) -> Tensor:
        """Logits ``(N, L, V)``."""
        x = self.embed(text) + self.place(torch.arange(text.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Setting(NamedTuple):
    """What a run is trained with."""

    norms: bool
    rate: float
    reparametrized: bool


class Outcome(NamedTuple):
    """How a run went: mean loss of its last 30 steps, and the largest after the 20th."""

    final: float
    largest: float


def train(setting: Setting, seed: int, steps: int) -> Outcome:
    """One run."""
    torch.manual_seed(seed)
    model = GPT(setting.norms)
    if setting.reparametrized:
        SigmaReparam.convert_(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.rate)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(TEXT) - CONTEXT - 1, (BATCH, 1))
        text = TEXT[starts + torch.arange(CONTEXT + 1)]
        loss = functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if setting.reparametrized:
            SigmaReparam.update_(model)
        losses.append(loss.item())
    return Outcome(sum(losses[-30:]) / len(losses[-30:]), max(losses[min(20, steps - 1) :], default=inf))


def entropy() -> float:
    """Of a single character, in nats: what knows nothing but how frequent each is."""
    share = torch.bincount(TEXT) / len(TEXT)
    return -float((share * share.log()).sum())


def row(setting: Setting, outcomes: list[Outcome]) -> str:
    """A line of the table."""
    lost = sum(not outcome.final < DIVERGED * entropy() for outcome in outcomes)
    finals = ", ".join(f"{outcome.final:.3g}" for outcome in outcomes)
    names = ["LayerNorm" if setting.norms else "none", f"{setting.rate:g}", "yes" if setting.reparametrized else "no"]
    worst = max(outcome.largest for outcome in outcomes)
    return f"| {' | '.join([*names, finals, f'{worst:.2g}', f'{lost} of {len(outcomes)}'])} |"


def main() -> None:
    """Train all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, which show that it runs")
    quick = parser.parse_args().quick
    steps, seeds = (3, range(1)) if quick else (150, range(3))
    print(
        "| norms | rate | reparametrized | loss at the end, by seed | largest | diverged |\n|---|---|---|---|---|---|"
    )
    for chosen in product((False, True), RATES, (False, True)):
        setting = Setting(*chosen)
        print(row(setting, [train(setting, seed, steps) for seed in seeds]), flush=True)
    print(f"After {steps} steps; the entropy of a character is {entropy():.2f}.")


if __name__ == "__main__":
    main()
