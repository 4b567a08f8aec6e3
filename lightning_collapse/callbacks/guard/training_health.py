"""Training health: whether loss, gradients and weights are finite, asked at points and only where rows are not."""

from collections.abc import Iterable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_collapse.rules import TRAINING
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.parameters import as_real, why_no_number
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.sharding import local

ROWS = "nonfinite_fraction"


class TrainingHealth:
    """Tells rows that the model masks from a training that fails.

    Between points nothing is computed: the latest loss is kept where it lies.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None

    def note_loss(self, loss: Tensor) -> None:
        """Keep the loss of the running step, without its graph."""
        self._loss = loss.detach()

    def points(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> list[Point]:
        """The reading ``nonfinite`` of the training, 1 or 0, if one of the points counts rows that are not finite.

        Collective, and waits for the device then: every process must bring the same points.
        """
        if not any(point.measure == ROWS and point.value > 0 for point in points):
            return []
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        loss = [self._loss] if self._loss is not None else []
        finite = _are_finite(pl_module, [*loss, *gradients, *pl_module.parameters()])
        finite = trainer.strategy.reduce_boolean_decision(finite)
        return [Point(TRAINING, "", "nonfinite", points[0].step, float(not finite))]


def weights_are_finite(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether no weight is NaN or infinite. Collective; waits for the device once, right before a checkpoint does."""
    return trainer.strategy.reduce_boolean_decision(_are_finite(pl_module, pl_module.parameters()))


def _are_finite(pl_module: LightningModule, tensors: Iterable[Tensor]) -> bool:
    parts = [as_real(local(tensor.detach())) for tensor in tensors if not why_no_number(tensor)]
    # a sum is finite if and only if its terms are
    sums = [part.sum(dtype=accumulation_dtype(part.device)) for part in parts]
    return not sums or bool(torch.stack([one.to(pl_module.device) for one in sums]).sum().isfinite())
