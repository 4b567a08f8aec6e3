"""Do language models that collapse further predict better? Small GPTs of four widths on English text.

Run: ``python examples/linguistic_collapse.py`` (six minutes on one core; with ``--quick`` two short runs).
"""

import argparse
import logging
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.functional import spearman_corrcoef

from lightning_collapse.functional import cdnv, gnc2
from lightning_collapse.spectral import ClassMoments

WIDTHS = (16, 32, 64, 128)
CONTEXT, BATCH, DEPTH, HEADS, RATE, WARM_UP = 48, 16, 2, 4, 3e-3, 50
IN_VOCABULARY, MIN_COUNT, BLOCK = 5, 10, 10 * CONTEXT + 1

WORDS = re.findall(r"\w+|[^\w\s]", "\n".join(topics[name] for name in sorted(topics)).lower())
VOCABULARY = ["", *sorted(word for word, count in Counter(WORDS).items() if count >= IN_VOCABULARY)]
"""The first entry stands for every rarer word; it is predicted like the others, but is no class."""
_INDEX = {word: i for i, word in enumerate(VOCABULARY)}
BLOCKS = torch.tensor([_INDEX.get(word, 0) for word in WORDS]).unfold(0, BLOCK, BLOCK - 1)
HELD_OUT = torch.arange(len(BLOCKS)) % 10 == 9


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape ``(N, L, D)``."""
        qkv = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class GPT(LightningModule):
    """Next word."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.words, self.places = nn.Embedding(len(VOCABULARY), width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY), bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, words: Tensor) -> Tensor:
        """What the head receives, shape ``(N, L, D)``."""
        features: Tensor = self.norm(self.blocks(self.words(words) + self.places.weight))
        return features

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy of the next word."""
        return nn.functional.cross_entropy(self.head(self(batch[:, :-1])).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up and a linear way down."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / WARM_UP, (self.steps - step + 1) / self.steps)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Passages(IterableDataset[Tensor]):
    """Random passages of the blocks to train on, the same ones for every width."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        blocks = BLOCKS[~HELD_OUT]
        while True:
            rows = torch.randint(len(blocks), (BATCH, 1), generator=generator)
            start = torch.randint(BLOCK - CONTEXT, (BATCH, 1), generator=generator)
            yield blocks[rows, start + torch.arange(CONTEXT + 1)]


class Reading(NamedTuple):
    """What one trained model reads: in eval mode, collapse over the text it was trained on, every next word a class."""

    validation_loss: float
    log_cdnv: float  # logarithm of the mean over pairs
    mean_log_cdnv: float
    gnc2: float
    classes: int
    left_out: int  # classes with fewer than MIN_COUNT rows


@torch.no_grad()
def read(model: GPT) -> Reading:
    """Measure."""
    model.eval()
    moments = ClassMoments(len(VOCABULARY), model.head.in_features, scatter=False, ignore_index=0)
    for passages in _passages(BLOCKS[~HELD_OUT]):
        moments.update(model(passages[:, :-1]).flatten(0, 1), passages[:, 1:].flatten())
    losses = [model.training_step(passages, 0).item() for passages in _passages(BLOCKS[HELD_OUT])]
    seen, enough = moments.count > 0, moments.count >= MIN_COUNT
    counts = moments.count * enough
    pairs = cdnv(moments.means, moments.within_traces / moments.count.clamp_min(1), counts)
    return Reading(
        validation_loss=statistics.fmean(losses),
        log_cdnv=pairs.mean.log().item(),
        mean_log_cdnv=pairs.mean_log.item(),
        gnc2=gnc2(moments.means, counts).variance.item(),
        classes=int(enough.sum()),
        left_out=int((seen & ~enough).sum()),
    )


def _passages(blocks: Tensor) -> Iterator[Tensor]:
    """All of the blocks, cut into passages, a block at a time."""
    for block in blocks:
        yield block.unfold(0, CONTEXT + 1, CONTEXT)


def train(width: int, seed: int, steps: int) -> Reading:
    """Train once, and read."""
    seed_everything(seed, verbose=False)
    model = GPT(width, steps)
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
    return read(model)


CORRELATES = {"log CDNV": ("log_cdnv", "+0.94"), "mean log CDNV": ("mean_log_cdnv", ""), "GNC2": ("gnc2", "+0.92")}
"""The field, and what the paper has over 230 models, recomputed from its published results."""


def table(runs: dict[tuple[int, int], Reading]) -> str:
    """Every run a row, in Markdown, and below the rank correlations with the validation loss."""
    lines = [f"| width | seed | validation loss | {' | '.join(CORRELATES)} |", "|---" * 6 + "|"]
    for (width, seed), reading in runs.items():
        cells = (reading.validation_loss, reading.log_cdnv, reading.mean_log_cdnv, reading.gnc2)
        lines.append(f"| {width} | {seed} | {' | '.join(f'{cell:.3g}' for cell in cells)} |")
    lines += ["", "| rank correlation with validation loss | here | 230 models of arXiv 2405.17767 |", "|---|---|---|"]
    lines += [f"| {name} | {correlation(runs, field):+.2f} | {paper} |" for name, (field, paper) in CORRELATES.items()]
    return "\n".join(lines)


def correlation(runs: dict[tuple[int, int], Reading], name: str) -> float:
    """Spearman's, over all runs."""
    values, losses = (torch.tensor([getattr(run, key) for run in runs.values()]) for key in (name, "validation_loss"))
    return spearman_corrcoef(values, losses).item()


def main(steps: int = 600, seeds: int = 3, widths: Sequence[int] = WIDTHS) -> None:
    """Train all runs and print the tables."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        runs = {(width, seed): train(width, seed, steps) for width in widths for seed in range(seeds)}
    print(table(runs))
    some = next(iter(runs.values()))
    print(
        f"\nAfter {steps} steps, over {some.classes} next words seen at least {MIN_COUNT} times ({some.left_out} rarer"
        " ones left out), the rank correlation of validation loss with log CDNV is"
        f" {correlation(runs, 'log_cdnv'):+.2f} and with GNC2 {correlation(runs, 'gnc2'):+.2f}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two widths, one seed, 60 steps: to see that it runs")
    main(*((60, 1, WIDTHS[:2]) if parser.parse_args().quick else ()))
