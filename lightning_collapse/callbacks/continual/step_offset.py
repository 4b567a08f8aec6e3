"""Step offset: one x-axis for many trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.utilities.trainer import ends_step, logging_step


class ContinuedSteps:
    """Lightning's logging step, plus the steps of all trainers before: a new ``Trainer`` counts from 0 again."""

    def __init__(self) -> None:
        self._before = 0
        self._here = 0

    def start(self, trainer: Trainer) -> None:
        """Call when training starts."""
        if trainer.ckpt_path is None:  # else the trainer goes on where our state was saved
            step = logging_step(trainer)
            self._before += self._here - step
            self._here = step

    def after_batch(self, trainer: Trainer) -> None:
        """Call after every training batch."""
        if ends_step(trainer):
            self._here = logging_step(trainer) + 1

    def step(self, trainer: Trainer) -> int:
        """The step of a point that is published now."""
        return self._before + logging_step(trainer)

    def state_dict(self) -> dict[str, int]:
        """Two numbers."""
        return {"before": self._before, "here": self._here}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from :meth:`state_dict`."""
        self._before, self._here = state_dict["before"], state_dict["here"]


class StepsAcrossTasks(TaskAware):
    """What acts on tasks and publishes points on one x-axis."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = ContinuedSteps()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps.start(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._steps.after_batch(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._steps.load_state_dict(state_dict["steps"])
