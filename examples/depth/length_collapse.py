"""Do long texts end up alike in an encoder, and does a temperature help? Small masked models of English characters.

Run: ``python examples/depth/length_collapse.py`` (two minutes on one core; with ``--quick`` one short run).
"""

import argparse
import statistics
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_collapse.functional import low_pass_gain, mean_cosine
from lightning_collapse.monitoring import attention_maps

CHARACTERS, TEXT = torch.unique(
    torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore"))),
    return_inverse=True,
)
HIDDEN = len(CHARACTERS)
"""The number of a character that is to be guessed."""
WIDTH, HEADS, DEPTH, BATCH_TOKENS, TEXTS = 64, 4, 3, 1024, 16
LENGTHS = (32, 64, 128, 256, 512)
TEMPERATURES = (1.0, 0.8, 0.5)


class Attention(nn.Module):
    """Bidirectional self-attention whose logits are divided by a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.temperature = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Of shape ``(B, L, D)``."""
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.into(x).chunk(3, dim=-1))
        scale = query.shape[-1] ** -0.5 / self.temperature
        mixed: Tensor = self.out(
            F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)
        )
        return mixed


class Encoder(nn.Module):
    """Three blocks that guess hidden characters; where a character stands a convolution says, at any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(HIDDEN + 1, WIDTH)
        self.near = nn.Conv1d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.attention = nn.ModuleList(Attention() for _ in range(DEPTH))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(DEPTH)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH + 1))
        self.head = nn.Linear(WIDTH, HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        """States ``(B, L, D)`` of characters ``(B, L)``."""
        x = self.embed(ids)
        x = x + self.near(x.mT).mT
        for norm, attention, mlp in zip(self.norms, self.attention, self.mlp, strict=False):
            x = x + attention(norm(x))
            x = x + mlp(x)
        states: Tensor = self.norms[-1](x)
        return states


class Reading(NamedTuple):
    """Of texts of one length."""

    cosine: float  # mean over pairs of texts, of the mean of their states
    inputs: float  # the same of the mean of their embeddings, which no attention has mixed
    gain: float  # mean over layers, of the mean of their heads' maps


def texts(count: int, length: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
    """Pieces of the text; the last tenth is never trained on."""
    border = len(TEXT) * 9 // 10
    low, high = (border, len(TEXT)) if held_out else (0, border)
    start = torch.randint(low, high - length, (count, 1), generator=generator)
    found: Tensor = TEXT[start + torch.arange(length)]
    return found


def train(seed: int, steps: int, lengths: Sequence[int] = LENGTHS) -> Encoder:
    """Guess a seventh of the characters of texts of all lengths, equally many characters a step."""
    torch.manual_seed(seed)
    model, generator = Encoder(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 1))
    for step in range(steps):
        length = lengths[step % len(lengths)]
        ids = texts(BATCH_TOKENS // length, length, generator)
        hidden = torch.rand(ids.shape, generator=generator) < 0.15
        states = model(ids.masked_fill(hidden, HIDDEN))
        loss = F.cross_entropy(model.head(states[hidden]), ids[hidden])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def read(model: Encoder, length: int, temperature: float) -> Reading:
    """Measure on held-out texts."""
    for attention in model.attention:
        attention.temperature = temperature  # type: ignore[assignment]
    ids = texts(TEXTS, length, torch.Generator().manual_seed(0), held_out=True)
    cosine, inputs = (mean_cosine(states.mean(dim=1)).item() for states in (model(ids), model.embed(ids)))
    return Reading(cosine, inputs, low_pass_gain(attention_maps(model, ids[:4])).mean().item())


def table(runs: dict[tuple[str, int, float, int], Reading], seeds: int, lengths: Sequence[int]) -> str:
    """Medians over seeds and ranges, in Markdown."""
    lines = ["| encoder | length | cosine of texts | of their embeddings alone | gain |", "|---" * 5 + "|"]
    kinds = [("untrained", 1.0), *(("trained", temperature) for temperature in TEMPERATURES)]
    for kind, temperature in kinds:
        for length in lengths:
            some = [runs[kind, length, temperature, seed] for seed in range(seeds)]
            cells = [_said([getattr(reading, name) for reading in some]) for name in Reading._fields]
            lines.append(f"| {kind}, temperature {temperature:g} | {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(steps: int = 300, seeds: int = 3, lengths: Sequence[int] = LENGTHS) -> None:
    """Train the encoders, read them at every length and temperature, and print the table."""
    runs = {}
    for seed in range(seeds):
        for kind, temperatures in (("untrained", (1.0,)), ("trained", TEMPERATURES)):
            model = train(seed, steps if kind == "trained" else 0, lengths)
            for length in lengths:
                for temperature in temperatures:
                    runs[kind, length, temperature, seed] = read(model, length, temperature)
    print(table(runs, seeds, lengths))
    ends = [
        statistics.median(runs["trained", length, 1.0, seed].cosine for seed in range(seeds))
        for length in (lengths[0], lengths[-1])
    ]
    print(
        f"\nAfter {steps} steps two texts of {lengths[0]} characters had a cosine of {ends[0]:.2f}, of {lengths[-1]}"
        f" {ends[1]:.2f}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 5 steps, short texts: to see that it runs")
    main(*((5, 1, LENGTHS[:2]) if parser.parse_args().quick else ()))
