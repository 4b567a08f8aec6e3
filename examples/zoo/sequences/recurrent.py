"""Recurrent networks: a plain one that overflows in mid-run, and an LSTM whose weight decay leaves its states alike."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, accuracy, explained
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, RegressionCollapseMonitor, SpectralAlignmentMonitor

from .material import drawn, held_out_of

LENGTH, SIZE, WIDTH, ONSET = 24, 32, 32, 250


def sums(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
    """Numbers and marks ``(N, L, 2)``, and the sum of those that are marked, ``(N, 1)``."""
    numbers = torch.rand(SIZE, LENGTH, generator=generator)
    marks = (torch.rand(SIZE, LENGTH, generator=generator) < 0.2).float()
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(dim=1, keepdim=True)


def grows(step: int) -> float:
    """Constant, then ever faster."""
    return float(1.05 ** max(step - ONSET, 0))


class Adder(Learner):
    """A recurrent ReLU network that begins as the identity (Le et al. 2015, arXiv 1504.00941)."""

    def __init__(self, explodes: bool) -> None:
        super().__init__(rate=0.01, momentum=0.0, schedule=grows if explodes else None)
        self.rnn, self.head = nn.RNN(2, WIDTH, nonlinearity="relu", batch_first=True), nn.Linear(WIDTH, 1)
        nn.init.eye_(self.rnn.weight_hh_l0)

    def forward(self, rows: Tensor) -> Tensor:
        """Predictions ``(N, 1)``."""
        sums: Tensor = self.head(self.rnn(rows)[0][:, -1])
        return sums

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        rows, targets = batch
        return nn.functional.mse_loss(self(rows), targets)


def adder(seed: int, explodes: bool) -> Habitat:
    """Sums of marked numbers."""
    model = Adder(explodes)
    batches = [held_out_of(sums, 10 * seed + i) for i in range(8)]
    rows, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    return Habitat(
        model,
        [drawn(sums, seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), RegressionCollapseMonitor()],
        steps=500,
        every=10,
        embedding=model.rnn,
        held_out=lambda: explained(model, rows, targets),
    )


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
    batches = [held_out_of(votes, 10 * seed + i) for i in range(8)]
    tokens, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    loaders = [drawn(votes, seed)]
    return Habitat(model, loaders, monitors, 600, model.lstm, lambda: accuracy(model, tokens, labels), every=10)


SPECIMENS = (
    Specimen(
        "recurrent overflow",
        adder,
        "steps grow until a state overflows",
        kind="non_finite",
        setting="explodes",
        healthy=False,
        sick=True,
        claims=("loss_explosion",),
        family="recurrent",
        onset=ONSET,
    ),
    Specimen(
        "states that decay",
        reader,
        "weight decay leaves nothing of what was read in the states",
        kind="complete_collapse",
        setting="decay",
        healthy=0.01,
        sick=20.0,
        claims=("dimensional_collapse",),
        family="recurrent",
    ),
)
