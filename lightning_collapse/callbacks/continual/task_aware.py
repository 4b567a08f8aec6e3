"""What every callback shares that acts when a task ends."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override


class TaskAware(Callback, ABC):
    """Acts when a task ends: at the end of a fit, or where a :class:`~lightning_collapse.TaskBoundary` says so.

    A task ends once: a fit that trained nothing since, or that was interrupted, ends none. One object goes through all
    tasks, from one ``Trainer`` to the next; its state says how many have ended.

    Attributes:
        task: Index of the running task, from 0.
    """

    def __init__(self) -> None:
        self.task = 0
        self._trained = False
        self._started = False

    @abstractmethod
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The task of index :attr:`task` has ended. Collective: called on every process."""

    def finish_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the task, if it was trained at all."""
        if self._trained:
            self.end_task(trainer, pl_module)
            self._trained = False
            self.task += 1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:
            self.finish_task(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._started:
            return
        if not (trainer.num_training_batches and trainer.limit_train_batches):
            rank_zero_warn(
                f"`{type(self).__name__}`: this fit trained nothing, since it had no training batches. Look at the"
                " loader, and at `limit_train_batches`."
            )
        else:
            rank_zero_warn(
                f"`{type(self).__name__}`: this fit trained nothing, since its `Trainer` or its checkpoint had reached"
                " the end before. Make a new `Trainer` for every task, as `fit_tasks` does; the callbacks go on."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"task": self.task, "trained": self._trained}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.task, self._trained = state_dict["task"], state_dict["trained"]
