"""Joint embedding of sequences: a recurrent encoder whose views are to agree, with negatives or without."""

from functools import partial

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, mlp, neighbour_accuracy
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .drawn import drawn, held_out_of

KINDS, LENGTH, SIZE, WIDTH, TEMPERATURE = 8, 32, 48, 48, 0.2


def waves(generator: torch.Generator, step: int, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Noisy waves ``(N, L, 2)`` of eight frequencies, and which one it is."""
    kinds = torch.randint(KINDS, (size,), generator=generator)
    phase = 6.28 * torch.rand(size, 1, generator=generator)
    angle = phase + (0.15 + 0.15 * kinds[:, None]) * torch.arange(LENGTH)
    clean = torch.stack([angle.sin(), (2 * angle).cos()], dim=-1)
    return clean + 0.3 * torch.randn(size, LENGTH, 2, generator=generator), kinds


class Encoder(nn.Module):
    """A GRU; the mean of its states."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(2, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        """``(N, D)``."""
        features: Tensor = self.out(self.gru(rows)[0].mean(dim=1))
        return features


class Agreement(Learner):
    """An encoder, a projector, and the cosine of two views; the kind of wave rides along in the batch, unread."""

    def __init__(self, negatives: bool) -> None:
        super().__init__(rate=3e-3, decay=0.01)
        self.negatives = negatives
        self.encoder, self.projector = Encoder(), mlp(WIDTH, 64, 32)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """InfoNCE, or its numerator alone."""
        views = [batch[0][:, start : start + 24] * (0.8 + 0.4 * torch.rand(1)) for start in (0, 8)]
        first, second = (self.projector(self.encoder(rows + 0.1 * torch.randn_like(rows))) for rows in views)
        if not self.negatives:
            return nn.functional.mse_loss(first, second)
        cosines = nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).T
        return nn.functional.cross_entropy(cosines / TEMPERATURE, torch.arange(len(first)))


def make(seed: int, negatives: bool) -> Habitat:
    """Waves without labels."""
    model = Agreement(negatives)
    data = *held_out_of(partial(waves, size=300), seed), *held_out_of(partial(waves, size=300), 100 + seed)
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    loaders = [drawn(waves, seed)]
    return Habitat(model, loaders, monitors, 400, model.projector, lambda: neighbour_accuracy(model.encoder, data), 10)


SPECIMENS = (
    Specimen(
        "sequences without negatives",
        make,
        "that two parts of a wave agree is the whole loss",
        kind="complete_collapse",
        setting="negatives",
        healthy=True,
        sick=False,
        claims=("dimensional_collapse",),
        layers=("encoder*", "projector*"),
        family="joint embedding",
    ),
)
