"""Replaced token detection: a healthy pair of a generator and a discriminator, whose targets are lopsided."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .drawn import drawn, held_out_of
from .transformer import LENGTH, VOCABULARY, Transformer

MASK, WEIGHT = VOCABULARY, 10.0


class Electra(Learner):
    """Which tokens are those of a generator that sees no others? (Clark et al. 2020, arXiv 2003.10555)."""

    def __init__(self) -> None:
        super().__init__(rate=3e-3)
        self.generator = Transformer(VOCABULARY, blocks=0, causal=False)
        self.discriminator = Transformer(1, blocks=2, causal=False)

    def corrupt(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of which some are the generator's, the generator's logits, and which were masked."""
        masked = torch.rand(tokens.shape) < 0.2
        logits = self.generator(tokens.masked_fill(masked, MASK))
        guesses = (logits.detach() - torch.empty_like(logits).exponential_().log()).argmax(dim=-1)
        return torch.where(masked, guesses, tokens), logits, masked

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy of the masked, and of the replaced."""
        corrupted, logits, masked = self.corrupt(batch)
        replaced = (corrupted != batch).float()
        detection = nn.functional.binary_cross_entropy_with_logits(self.discriminator(corrupted).squeeze(-1), replaced)
        return nn.functional.cross_entropy(logits[masked], batch[masked]) + WEIGHT * detection


def progressions(generator: torch.Generator, step: int) -> Tensor:
    """Tokens ``(N, L)`` that rise by one, two or three in a circle."""
    start = torch.randint(VOCABULARY, (32, 1), generator=generator)
    stride = torch.randint(1, 4, (32, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % VOCABULARY


def make(seed: int) -> Habitat:
    """The score is how often the discriminator is right about tokens a fifth of which are random."""
    model, generator = Electra(), torch.Generator().manual_seed(seed)
    tokens = held_out_of(progressions, seed)
    noise = torch.randint(VOCABULARY, tokens.shape, generator=generator)
    corrupted = torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, noise, tokens)

    def right() -> float:
        said = model.discriminator(corrupted).squeeze(-1) > 0
        return float((said == (corrupted != tokens)).double().mean())

    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor()]
    return Habitat(model, [drawn(progressions, seed)], monitors, 500, model.discriminator.norm, right, every=10)


SPECIMENS = (
    Specimen(
        "replaced tokens", make, "two networks in one, and nine of ten targets are the same", family="transformer"
    ),
)
