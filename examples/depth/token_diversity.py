"""Do tokens stay apart over 24 layers? A narrow transformer reads text with masked letters, built in five ways.

Run: ``python examples/depth/token_diversity.py`` (three to five minutes on one core; ``--quick``: one short run each).
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, IterableDataset

from lightning_collapse.layers import AugmentedShortcut, LayerScale, MVSplitResidual, layer_scale_init

DEPTH, WIDTH, HEADS, LENGTH, BATCH, RATE, WARM_UP, MASKED = 24, 32, 4, 48, 8, 1e-3, 40, 0.15
READ = (1, 6, 12, 18, 24)

_TEXT = "\n".join(topics[name] for name in sorted(topics))
LETTERS = ["", *sorted(set(_TEXT))]
"""The first one stands for a masked letter."""
_INDEX = {letter: i for i, letter in enumerate(LETTERS)}
TEXT = torch.tensor([_INDEX[letter] for letter in _TEXT])
HELD_OUT = len(TEXT) * 9 // 10


class Plain(nn.Module):
    """A residual sum with the norm behind it, as transformers began."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """The next stream ``(N, L, D)``."""
        output: Tensor = self.norm(x + branch(x))
        return output


class PreNorm(Plain):
    """A norm in front of the branch, and a sum that nothing touches."""

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """The next stream ``(N, L, D)``."""
        return x + branch(self.norm(x))


class MVSplit(nn.Module):
    """Its gates stand for the sum and for the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.residual = MVSplitResidual(WIDTH)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """The next stream ``(N, L, D)``."""
        output: Tensor = self.residual(x, branch(x))
        return output


class Augmented(Plain):
    """Paths beside the sum; the stream is normed already."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = AugmentedShortcut(WIDTH)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """The next stream ``(N, L, D)``."""
        output: Tensor = self.norm(self.shortcut(x, branch(x), x))
        return output


WAYS = {
    "plain": Plain,
    "LayerScale": Plain,
    "MV-Split": MVSplit,
    "augmented shortcuts": Augmented,
    "pre-norm": PreNorm,
}


class Attention(nn.Module):
    """Every token looks at all."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(N, L, D)``."""
        query, key, value = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        output: Tensor = self.out_proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2))
        return output


class Block(nn.Module):
    """Attention and a small MLP."""

    def __init__(self, way: type[nn.Module]) -> None:
        super().__init__()
        self.attention, self.first, self.second = Attention(), way(), way()
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(WIDTH, WIDTH))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """The next stream ``(N, L, D)``."""
        output: Tensor = self.second(self.first(x, self.attention), self.mlp)
        return output


class Reader(LightningModule):
    """Says which letters were masked."""

    def __init__(self, way: str, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(WAYS[way]) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS))
        if way == "LayerScale":
            LayerScale.convert_(self, init=layer_scale_init(DEPTH))

    def forward(self, letters: Tensor) -> list[Tensor]:
        """The stream behind every block, ``(N, L, D)`` each."""
        streams = [self.letters(letters) + self.places.weight]
        for block in self.blocks:
            streams.append(block(streams[-1]))
        return streams[1:]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the masked letters."""
        letters, masked = batch
        logits = self.head(self.norm(self(letters.where(~masked, 0))[-1]))
        return cross_entropy(logits[masked], letters[masked])

    def configure_optimizers(self) -> Any:
        """Adam with a warm-up and a linear way down."""
        optimizer = torch.optim.Adam(self.parameters(), lr=RATE)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / WARM_UP, (self.steps - step + 1) / self.steps)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def passage(text: Tensor, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Letters ``(N, L)``, and which of them are to be told."""
    start = torch.randint(len(text) - LENGTH, (rows, 1), generator=generator)
    return text[start + torch.arange(LENGTH)], torch.rand(rows, LENGTH, generator=generator) < MASKED


class Passages(IterableDataset[tuple[Tensor, Tensor]]):
    """Random passages, the same ones for every way."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield passage(TEXT[:HELD_OUT], generator, BATCH)


class Reading(NamedTuple):
    """What a model reads on held-out text."""

    residuals: list[float]  # of READ, distance of tokens from their mean over their length
    loss: float


@torch.no_grad()
def read(model: Reader, rows: int) -> Reading:
    """Measure on the same passages always."""
    letters, masked = passage(TEXT[HELD_OUT:], torch.Generator().manual_seed(0), rows)
    residuals = []
    for stream in model.eval()(letters.where(~masked, 0)):
        apart = stream - stream.mean(dim=1, keepdim=True)
        residuals.append((apart.norm(dim=(1, 2)) / stream.norm(dim=(1, 2))).mean().item())
    return Reading([residuals[layer - 1] for layer in READ], model.training_step((letters, masked), 0).item())


def train(way: str, seed: int, steps: int, rows: int) -> tuple[Reading, Reading]:
    """Read at the start and at the end."""
    seed_everything(seed, verbose=False)
    model = Reader(way, steps)
    before = read(model, rows)
    model.train()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(Passages(seed), batch_size=None))
    return before, read(model, rows)


def table(runs: dict[str, list[tuple[Reading, Reading]]]) -> str:
    """In Markdown, medians over seeds; the loss with its range."""
    layers = " | ".join(f"layer {layer}" for layer in READ)
    lines = [f"| residual sum | when | {layers} | loss |", "|---" * (3 + len(READ)) + "|"]
    for way, found in runs.items():
        for when, readings in zip(("start", "end"), zip(*found, strict=True), strict=True):
            cells = [f"{statistics.median(r.residuals[i] for r in readings):.2g}" for i in range(len(READ))]
            losses = sorted(r.loss for r in readings)
            loss = f"{statistics.median(losses):.2f} ({losses[0]:.2f} to {losses[-1]:.2f})"
            lines.append(f"| {way} | {when} | {' | '.join(cells)} | {loss} |")
    return "\n".join(lines)


def main(steps: int = 150, seeds: int = 3, rows: int = 128) -> None:
    """Train all and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        runs = {way: [train(way, seed, steps, rows) for seed in range(seeds)] for way in WAYS}
    print(table(runs))
    share = TEXT[:HELD_OUT].bincount(minlength=len(LETTERS)).float().clamp_min(0.5)
    alone = cross_entropy(share.log().expand(len(TEXT) - HELD_OUT, -1), TEXT[HELD_OUT:]).item()
    last = {way: statistics.median(end.loss for _, end in found) for way, found in runs.items()}
    losses = ", ".join(f"{loss:.2f} ({way})" for way, loss in last.items())
    print(f"\nAfter {steps} steps the loss is {losses}; frequencies of letters alone would read {alone:.2f}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 2 steps: to see that it runs")
    main(*((2, 1, 4) if parser.parse_args().quick else ()))
