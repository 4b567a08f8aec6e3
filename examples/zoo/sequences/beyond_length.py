"""States that explode where text is longer than in training, though the loss of training is as it should be."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, accuracy
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, StateMonitor

from .drawn import drawn, held_out_rows

LENGTH, SIZE, WIDTH = 16, 32, 32


def votes(generator: torch.Generator, step: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Votes ``(N, L)`` for one of four, and who has most."""
    tokens = torch.randint(4, (SIZE, length), generator=generator)
    return tokens, nn.functional.one_hot(tokens, 4).sum(dim=1).argmax(dim=1)


def longer(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
    """The same of twice as many votes."""
    return votes(generator, step, 2 * LENGTH)


class Counter(Learner):
    """A plain recurrent network of rectifiers, whose recurrent weight begins as a multiple of the identity."""

    def __init__(self, scale: float) -> None:
        super().__init__(1e-3)
        self.tokens, self.head = nn.Embedding(4, 16), nn.Linear(WIDTH, 4)
        self.rnn = nn.RNN(16, WIDTH, nonlinearity="relu", batch_first=True)
        with torch.no_grad():
            self.rnn.get_parameter("weight_hh_l0").copy_(scale * torch.eye(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(N, C)``."""
        logits: Tensor = self.head(self.rnn(self.tokens(tokens))[0][:, -1])
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        tokens, labels = batch
        return nn.functional.cross_entropy(self(tokens), labels)


def counter(seed: int, scale: float) -> Habitat:
    """The most frequent of four tokens, asked of longer text in the end."""
    model, (tokens, labels) = Counter(scale), held_out_rows(longer, seed)
    monitors = [CollapseMonitor(), StateMonitor()]
    return Habitat(model, [drawn(votes, seed)], monitors, 400, model.rnn, lambda: accuracy(model, tokens, labels), 10)


SPECIMENS = (
    Specimen(
        "states beyond their length",
        counter,
        "a recurrent weight above the identity lets states explode where text is longer than in training",
        kind="state_collapse",
        setting="scale",
        healthy=0.95,
        sick=1.2,
        layers=("rnn",),
        develops=False,
        family="recurrent",
    ),
)
