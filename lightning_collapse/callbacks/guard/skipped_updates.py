"""Skipped updates: those of a trainer's optimizers, and of the averages of weights that follow them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_collapse.utilities.optimizers import searches_line
from lightning_collapse.utilities.skippable_step import Decision, SkippableStep
from lightning_collapse.utilities.training_step import wrap_method
from lightning_collapse.utilities.twin_packages import is_kind


class SkippedUpdates:
    """Leaves out updates of the optimizers of a trainer, and what would follow them in averages of the weights.

    An average, of ``WeightAveraging``, ``EMAWeightAveraging`` or any other ``AveragedModel`` that a callback or the
    module has, is not updated when no optimizer step was made since its last update. It waits for the device then, as
    torch's own ``AveragedModel.update_parameters`` does each time.

    Args:
        trainer: Whose.
        decide: Asked right before each update with the optimizer, see :class:`SkippableStep`.
        who: Whom an error names.
        averages: What :meth:`state_dict` told.

    Raises:
        MisconfigurationException: If an update of an optimizer cannot be left out.
    """

    def __init__(
        self, trainer: Trainer, decide: Callable[[Optimizer], Decision], who: str, averages: Sequence[bool | None] = ()
    ) -> None:
        if is_kind(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(f"`{who}` cannot leave out updates of DeepSpeed, whose engine makes them.")
        for name in [type(optimizer).__name__ for optimizer in trainer.optimizers if searches_line(optimizer)]:
            raise MisconfigurationException(
                f"`{who}` cannot leave out an update of `{name}`, which runs its closure several times in a step and"
                " compares the losses. Use an optimizer that makes one update of one gradient."
            )
        self._steps = [SkippableStep(optimizer, partial(decide, optimizer)) for optimizer in trainer.optimizers]
        self._averages = [_GatedAverage(average) for average in _averages(trainer)]
        if len(averages) == len(self._averages):
            for gate, skipped in zip(self._averages, averages, strict=True):
                gate.skipped = skipped

    def note(self, skipped: Decision) -> None:
        """An update is made or skipped now; averages hear of it here."""
        for average in self._averages:
            average.note(skipped)

    def remove(self) -> None:
        """Leave optimizers and averages as they were found; may be called more than once."""
        for step in self._steps:
            step.remove()
        for average in self._averages:
            average.remove()

    def state_dict(self) -> list[bool | None]:
        """Of each average whether all updates since its last one were skipped; waits for the device if any."""
        return [None if gate.skipped is None else bool(gate.skipped) for gate in self._averages]


_GATES: WeakKeyDictionary[AveragedModel, WeakSet[_GatedAverage]] = WeakKeyDictionary()


class _GatedAverage:
    def __init__(self, average: AveragedModel) -> None:
        self.skipped: Decision = None  # nothing was updated since
        self.remove = wrap_method(average, "update_parameters", self._update)
        self._all = _GATES.setdefault(average, WeakSet())  # two actions may skip, and count from the same update on
        self._all.add(self)

    def note(self, skipped: Decision) -> None:
        skipped = False if skipped is None else skipped
        if self.skipped is None or skipped is False:
            self.skipped = skipped
        elif self.skipped is not False and skipped is not True:
            self.skipped = skipped if self.skipped is True else torch.minimum(torch.as_tensor(self.skipped), skipped)

    def _update(self, update: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        skipped, self.skipped = self.skipped, None
        if not skipped:
            return update(*args, **kwargs)
        for gate in self._all:
            gate.skipped = None
        return None


def _averages(trainer: Trainer) -> list[AveragedModel]:
    held = [value for callback in trainer.callbacks for value in vars(callback).values()]
    found = [value for value in (*held, *trainer.lightning_module.modules()) if isinstance(value, AveragedModel)]
    return list({id(average): average for average in found}.values())
