"""Training health: the loss since the last point, and whether all is finite, asked where rows are not."""

from collections.abc import Iterable, Sequence, Set

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_collapse.callbacks.monitors.monitor import Monitor
from lightning_collapse.rules import TRAINING
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size
from lightning_collapse.utilities.parameters import as_real, why_no_number
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.sharding import local
from lightning_collapse.utilities.trainer import planned_steps

ROWS = "nonfinite_fraction"


class TrainingHealth:
    """Tells whether the loss goes on falling, and rows that the model masks from a training that fails.

    Between points losses are added up where they lie, and nothing waits for them. Every family of curves has a loss of
    its own, since its own last point: how often others are read changes nothing of it.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._count = 0
        self._since: dict[str, tuple[float, int]] = {}  # sum and number of losses since the last point, by family
        self._latest = -1, 0.0, 0
        # monitors whose points are of the same step are all told
        self._told: dict[str, Point] = {}

    def note_loss(self, loss: Tensor) -> None:
        """Add the loss of the running step, without its graph."""
        if self._loss is None:
            self._loss = torch.zeros((), device=loss.device, dtype=accumulation_dtype(loss.device))
        value = loss.detach()
        self._loss.add_(value if not value.ndim else value.mean())
        self._count += 1

    def points(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> list[Point]:
        """Readings of the training: ``loss`` of each family, its mean since the last point, and ``nonfinite``, 1 or 0.

        The latter is asked if one of the points counts rows that are not finite. Collective, and waits for the device:
        every process must bring the same points.
        """
        step = points[0].step
        loss, count, self._loss, self._count = self._loss, self._count, None, 0
        found = self._losses(step, {point.family for point in points}, *_summed(loss, count, pl_module.device))
        if any(point.measure == ROWS and point.value > 0 for point in points):
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            finite = _are_finite(
                pl_module, [*([loss] if loss is not None else ()), *gradients, *pl_module.parameters()]
            )
            finite = trainer.strategy.reduce_boolean_decision(finite)
            found.append(Point(TRAINING, "", "nonfinite", step, float(not finite)))
        return found

    def _losses(self, step: int, families: Set[str], added: float, count: int) -> list[Point]:
        """The loss of each of these families, after more of it has come."""
        if count:
            self._latest = step, added, count
        # another family may have had its point of this step before
        missed = self._latest[1:] if not count and self._latest[0] == step else (0.0, 0)
        self._since |= dict.fromkeys(families - self._since.keys(), missed)
        for family, (so_far, counted) in self._since.items():
            self._since[family] = so_far + added, counted + count
        for family in sorted(families):
            total, counted = self._since[family]
            if counted:
                self._told[family] = Point(TRAINING, family, "loss", step, total / counted)
                self._since[family] = 0.0, 0
        told = (self._told[family] for family in sorted(families) if family in self._told)
        return [point for point in told if point.step == step]


def _summed(loss: Tensor | None, count: int, device: torch.device) -> tuple[float, int]:
    """Sum and number of the losses of all processes; collective where there are several."""
    if world_size() == 1:
        return (0.0, 0) if loss is None else (loss.item(), count)  # waits for the device, at points as `to_host` does
    total = torch.tensor([0.0, float(count)], device=device, dtype=accumulation_dtype(device))
    if loss is not None:
        total[0] = loss
    summed, counted = all_reduce_sum(total).tolist()  # likewise
    return summed, int(counted)


def planned_points(trainer: Trainer) -> dict[str, int]:
    """How many points each family of curves will have in this fit, from its most frequent monitor, if that is known."""
    steps, planned = planned_steps(trainer) or 0, dict[str, int]()
    for monitor in (callback for callback in trainer.callbacks if isinstance(callback, Monitor)):
        every = monitor.usual_cadence(trainer)
        for family in monitor.families if steps and every else ():
            planned[family] = max(planned.get(family, 0), steps // every + 1)
    return planned


def weights_are_finite(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether no weight is NaN or infinite. Collective; waits for the device once, right before a checkpoint does."""
    return trainer.strategy.reduce_boolean_decision(_are_finite(pl_module, pl_module.parameters()))


def _are_finite(pl_module: LightningModule, tensors: Iterable[Tensor]) -> bool:
    parts = [as_real(local(tensor.detach())) for tensor in tensors if not why_no_number(tensor)]
    # a sum is finite if and only if its terms are
    sums = [part.sum(dtype=accumulation_dtype(part.device)) for part in parts]
    return not sums or bool(torch.stack([one.to(pl_module.device) for one in sums]).sum().isfinite())
