"""The module of the specimens that learn without labels that two views agree."""

from typing import Any

from torch import Tensor, nn

from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor
from lightning_collapse.losses import vicreg_terms

from .material import Learner, digits, loader, mlp, neighbour_accuracy, view
from .specimen import Habitat


class JointEmbedding(Learner):
    """An encoder, a projector and VICReg.

    Args:
        variance: Weight of what keeps every feature spread.
        covariance: Weight of what keeps features apart from each other.
        optimizer: See :class:`Learner`.
    """

    def __init__(self, variance: float, covariance: float, **optimizer: Any) -> None:
        super().__init__(**{"rate": 2e-3, **optimizer})
        self.variance, self.covariance = variance, covariance
        self.encoder, self.projector = mlp(64, 128, 64), mlp(64, 128, 64)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """The agreement of two views and what keeps rows apart."""
        first, second = (self.projector(self.encoder(view(batch[0]))) for _ in range(2))
        terms = vicreg_terms(first, second)
        agreement = 25 * nn.functional.mse_loss(first, second)
        total: Tensor = agreement + self.variance * terms["variance"] + self.covariance * terms["covariance"]
        return total


def joint_embedding(
    seed: int, variance: float = 25.0, covariance: float = 1.0, steps: int = 200, size: int = 128, **optimizer: Any
) -> Habitat:
    """Digits without labels."""
    data = digits(seed)
    model = JointEmbedding(variance, covariance, **optimizer)
    return Habitat(
        model,
        [loader(data[0], size=size, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor()],
        steps=steps,
        embedding=model.projector,
        held_out=lambda: neighbour_accuracy(model.encoder, data),
    )
