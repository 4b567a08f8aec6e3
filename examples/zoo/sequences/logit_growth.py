"""Entropy collapse of attention: the scale of its logits grows, and heads look at one token where all matter."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, accuracy
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .blocks import Attention, Block
from .drawn import drawn, held_out_rows

CLASSES, LENGTH, WIDTH, SIZE, STEPS, ONSET = 6, 24, 32, 32, 500, 150
CENTERS = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(0))


def measurements(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
    """Noisy measurements ``(N, L, 8)`` of one thing, and which it is."""
    labels = torch.randint(CLASSES, (SIZE,), generator=generator)
    noise = torch.randn(SIZE, LENGTH, 8, generator=generator)
    return CENTERS[labels, None] + 4 * noise, labels


class SetClassifier(Learner):
    """A transformer without places, of whose tokens the first one is asked."""

    def __init__(self, growth: float) -> None:
        super().__init__(rate=2e-3)
        self.growth = growth
        self.embed, self.question = nn.Linear(8, WIDTH), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks, self.head = nn.Sequential(Block(WIDTH), Block(WIDTH)), nn.Linear(WIDTH, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits ``(N, C)``."""
        tokens = torch.cat([self.question.expand(len(rows), -1, -1), self.embed(rows)], dim=1)
        logits: Tensor = self.head(self.blocks(tokens)[:, 0])
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        rows, labels = batch
        return nn.functional.cross_entropy(self(rows), labels)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logits grow."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.sharpness = self.growth ** max(self.global_step - ONSET, 0)


def make(seed: int, growth: float) -> Habitat:
    """Which of six things has been measured?"""
    model = SetClassifier(growth)
    rows, labels = held_out_rows(measurements, seed)
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor()]
    loaders = [drawn(measurements, seed)]
    return Habitat(model, loaders, monitors, STEPS, model.blocks, lambda: accuracy(model, rows, labels), every=10)


SPECIMENS = (
    Specimen(
        "attention logits that grow",
        make,
        "heads look at one token where the mean of all is asked",
        kind="attention_entropy_collapse",
        setting="growth",
        healthy=1.0,
        sick=1.02,
        layers=("blocks*attention*",),
        claims=("loss_explosion",),
        family="transformer",
        onset=ONSET,
    ),
)
