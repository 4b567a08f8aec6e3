"""Recurrent states that become alike: an LSTM whose weight decay leaves nothing of what it read."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, accuracy
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor, StateMonitor

from .drawn import drawn, held_out_rows

LENGTH, SIZE, WIDTH, ONSET = 24, 32, 32, 250


def votes(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
    """Votes ``(N, L)`` for one of four, and who has most."""
    tokens = torch.randint(4, (SIZE, LENGTH), generator=generator)
    return tokens, nn.functional.one_hot(tokens).sum(dim=1).argmax(dim=1)


class Reader(Learner):
    """An LSTM that reads tokens, and a head that sees its last state."""

    def __init__(self, decay: float) -> None:
        super().__init__(3e-3, decay)
        self.tokens, self.lstm, self.head = nn.Embedding(4, 16), nn.LSTM(16, 48, batch_first=True), nn.Linear(48, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(N, C)``."""
        logits: Tensor = self.head(self.lstm(self.tokens(tokens))[0][:, -1])
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        tokens, labels = batch
        return nn.functional.cross_entropy(self(tokens), labels)


def reader(seed: int, decay: float) -> Habitat:
    """The most frequent of four tokens."""
    model = Reader(decay)
    tokens, labels = held_out_rows(votes, seed)
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), StateMonitor()]
    loaders = [drawn(votes, seed)]
    return Habitat(model, loaders, monitors, 600, model.lstm, lambda: accuracy(model, tokens, labels), every=10)


SPECIMENS = (
    Specimen(
        "states that decay",
        reader,
        "weight decay leaves nothing of what was read in the states",
        kind="complete_collapse",
        setting="decay",
        healthy=0.01,
        sick=20.0,
        claims=("dimensional_collapse", "state_collapse"),
        family="recurrent",
    ),
)
