"""Low-rank adaptation (LoRA) of a frozen transformer that diverges at a large rate."""

from functools import cache, partial

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, accuracy
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .material import Block, drawn, held_out_of

VOCABULARY, LENGTH, WIDTH, SIZE, CLASSES = 16, 16, 32, 32, 4


def sequences(shift: int, generator: torch.Generator, step: int, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Tokens ``(N, L)``, and which of four groups of tokens, after a shift, has most of them."""
    labels = torch.randint(CLASSES, (size,), generator=generator)
    tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    own = torch.rand(size, LENGTH, generator=generator) < 0.3
    tokens = torch.where(own, tokens // CLASSES * CLASSES + labels[:, None], tokens)
    return (tokens + shift) % VOCABULARY, labels


class LoRA(nn.Module):
    """A frozen linear layer and a trained product of two thin ones (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down, self.up = nn.Linear(frozen.in_features, rank, bias=False), nn.Linear(rank, frozen.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """As the frozen layer at first."""
        output: Tensor = self.frozen(x) + self.up(self.down(x))
        return output


class SequenceClassifier(Learner):
    """Two blocks, the mean of tokens, a head."""

    def __init__(self, rate: float = 3e-3) -> None:
        super().__init__(rate)
        self.tokens, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(Block(WIDTH), Block(WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(N, C)``."""
        logits: Tensor = self.head(self.blocks(self.tokens(tokens)).mean(dim=1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@cache
def pretrained(seed: int) -> SequenceClassifier:
    """After 150 steps on the first task."""
    model, generator = SequenceClassifier(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        torch.autograd.backward(model.training_step(sequences(0, generator, step), step))
        optimizer.step()
    return model


def fine_tuned(seed: int, shift: int = 2, rate: float = 5e-4, rank: int | None = None) -> Habitat:
    """The same with other tokens; of all weights, or with adapters of a rank."""
    model = SequenceClassifier(rate)
    model.load_state_dict(pretrained(seed).state_dict())
    if rank is not None:
        model.requires_grad_(False)
        for block in model.blocks:
            block.attention.qkv, block.attention.out = LoRA(block.attention.qkv, rank), LoRA(block.attention.out, rank)
            block.mlp[0], block.mlp[2] = LoRA(block.mlp[0], rank), LoRA(block.mlp[2], rank)
    batches = [held_out_of(partial(sequences, shift), 10 * seed + i) for i in range(8)]
    tokens, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor()]
    loaders = [drawn(partial(sequences, shift), seed)]
    return Habitat(model, loaders, monitors, 400, model.blocks, lambda: accuracy(model, tokens, labels), every=10)


def adapted(seed: int, rate: float, rank: int = 4) -> Habitat:
    """Adapters."""
    return fine_tuned(seed, rate=rate, rank=rank)


SPECIMENS = (
    Specimen(
        "adapters at a large rate",
        adapted,
        "thin updates of a frozen transformer diverge",
        kind="loss_explosion",
        setting="rate",
        healthy=5e-3,
        sick=0.3,
        claims=("complete_collapse", "dimensional_collapse", "attention_entropy_collapse"),
        family="adapters",
    ),
)
