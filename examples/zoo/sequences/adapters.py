"""Low-rank adaptation (LoRA) of a frozen transformer that diverges at a large rate."""

from functools import partial

from torch import Tensor, nn

from examples.zoo.material import accuracy
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .drawn import drawn, held_out_rows
from .token_groups import SequenceClassifier, pretrained, sequences


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


def fine_tuned(seed: int, shift: int = 2, rate: float = 5e-4, rank: int | None = None) -> Habitat:
    """The same with other tokens; of all weights, or with adapters of a rank."""
    model = SequenceClassifier(rate)
    model.load_state_dict(pretrained(seed).state_dict())
    if rank is not None:
        model.requires_grad_(False)
        for name, layer in list(model.blocks.named_modules()):
            if isinstance(layer, nn.Linear):
                model.blocks.set_submodule(name, LoRA(layer, rank))
    tokens, labels = held_out_rows(partial(sequences, shift), seed)
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
