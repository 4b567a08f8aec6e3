"""Task boundaries inside one long fit: known beforehand, or found where a curve jumps (task-free)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware, after_hook
from lightning_collapse.callbacks.loss_terms.weight_penalty import weight_penalties
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.trainer import is_due, without_module


class TaskBoundary(Callback):
    """Ends tasks at the ends of chosen epochs of a fit, for everything that acts when a task ends.

    Calls ``finish_task(trainer, pl_module)`` of every :class:`~lightning_collapse.TaskAware`
    callback and of the module, if it has one, when the epoch's training is over, after ``on_train_epoch_end`` of other
    callbacks and of the module: on the loader of the task that ends, and before a ``ModelCheckpoint`` saves the epoch
    (one with ``save_on_train_epoch_end=False``, or that saves after validation, does so before the task has ended).
    The last task ends with the fit, as ever.

    Data of the next task: a ``LightningDataModule`` with an attribute ``task_index`` finds the running task in it
    whenever ``train_dataloader()`` is called; ``Trainer(reload_dataloaders_every_n_epochs=1)`` has it called every
    epoch, and is required then. Any other source of data has to look at ``task_index`` itself.

    Args:
        every_n_epochs: A task ends after this many epochs, and again after as many.
        at_epochs: After how many epochs, counted from the start of the fit, tasks end.
        when: A function of the trainer, asked at the end of every epoch whether a task ends, such as
            ``CurveJump``; a task ends on all processes if it does on one. What its
            ``state_dict()`` returns, if it has one, is in the state of this callback.
        every_n_steps: Ask ``when`` after every so many optimizer steps instead of at the ends of epochs. The task ends
            before the next batch, so that a checkpoint saved in between knows of it. What reads training data then
            starts a second pass over the loader.

    Attributes:
        task_index: Index of the running task, from 0.

    Raises:
        ValueError: If not exactly one of the first three is given, or it makes no sense.
        MisconfigurationException: When the fit starts, if the data module would not be asked for the next task, or
            tasks may end in the middle of an epoch and a penalty would take the persistent workers of the data.

    Example::

        boundary = TaskBoundary(every_n_epochs=5)
        trainer = Trainer(max_epochs=25, callbacks=[boundary, metrics], reload_dataloaders_every_n_epochs=1)
        trainer.fit(model, datamodule=five_tasks)
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        at_epochs: Collection[int] | None = None,
        when: Callable[[Trainer], bool] | None = None,
        every_n_steps: int | None = None,
    ) -> None:
        choices = {"every_n_epochs": every_n_epochs, "at_epochs": at_epochs, "when": when}
        given = [f"`{name}`" for name, value in choices.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"Pass one of `every_n_epochs`, `at_epochs` and `when`, got {' and '.join(given) or 'none'}."
            )
        if every_n_epochs is not None and (not isinstance(every_n_epochs, int) or every_n_epochs < 1):
            raise ValueError(f"`every_n_epochs` must be a whole number of at least 1, got {every_n_epochs!r}.")
        if at_epochs is not None and (
            isinstance(at_epochs, str)
            or not isinstance(at_epochs, Collection)
            or not at_epochs
            or not all(isinstance(epoch, int) and epoch >= 1 for epoch in at_epochs)
        ):
            raise ValueError(f"`at_epochs` takes whole numbers of at least 1, got {at_epochs!r}.")
        if when is not None and not callable(when):
            raise ValueError(f"`when` takes a function of the trainer, got {when!r}.")
        if every_n_steps is not None:
            require_whole(1, every_n_steps=every_n_steps)
            if when is None:
                raise ValueError("`every_n_steps` says how often `when` is asked, and is given without it.")
        self.every_n_epochs, self.at_epochs = every_n_epochs, at_epochs
        self.when, self.every_n_steps = when, every_n_steps
        self.task_index = 0
        self._pending = False  # whether the task ends before the next batch
        self._containment = Containment(type(self).__name__)
        self._unwrap: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return without_module(self) | {"_unwrap": None}  # which holds on to the module of a running fit

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        follows = hasattr(trainer.datamodule, "task_index")
        if follows and trainer.reload_dataloaders_every_n_epochs != 1:
            raise MisconfigurationException(
                f"{type(trainer.datamodule).__name__} has a `task_index`, but is not asked for the next task's data"
                f" with `reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs}`. Set it to 1."
            )
        if not follows:
            rank_zero_info("`TaskBoundary`: no data module has a `task_index`; the data must change by themselves.")
        self._tell(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reads = any(p.penalty.needs_data and p.loader is None for p in weight_penalties(trainer))
        if self.every_n_steps and reads and getattr(trainer.train_dataloader, "persistent_workers", False):
            raise MisconfigurationException(
                f"`TaskBoundary(every_n_steps={self.every_n_steps})` ends tasks in the middle of an epoch, and a"
                " penalty that reads the training data then would take the workers of the running epoch. Set"
                " `persistent_workers=False`, or `WeightPenalty(..., loader=...)`."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._pending:
            self._end(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps and not trainer.fast_dev_run and is_due(trainer, self.every_n_steps):
            self._pending = self._pending or self._asked(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run and self._is_due(trainer):
            self._unwrap = after_hook(pl_module, "on_train_epoch_end", lambda: self._end(trainer, pl_module))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._unwrap is not None:
            self._unwrap()

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"task": self.task_index, "pending": self._pending}
        remembers = callable(getattr(self.when, "state_dict", None))
        return {**own, "when": self.when.state_dict()} if remembers else own  # type: ignore[union-attr]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.task_index, self._pending = state_dict["task"], state_dict.get("pending", False)
        if "when" in state_dict and callable(getattr(self.when, "load_state_dict", None)):
            self.when.load_state_dict(state_dict["when"])  # type: ignore[union-attr]

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pending = False
        finish_task(trainer, pl_module)
        self.task_index += 1
        self._tell(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs is not None:
            return epoch % self.every_n_epochs == 0
        if self.at_epochs is not None:
            return epoch in self.at_epochs
        return self._pending if self.every_n_steps else self._asked(trainer)

    def _asked(self, trainer: Trainer) -> bool:
        assert self.when is not None
        ends = False
        with self._containment("`when`", "no task ends there"):
            ends = bool(self.when(trainer))
        return bool(trainer.strategy.reduce_boolean_decision(ends, all=False))

    def _tell(self, trainer: Trainer) -> None:
        if hasattr(trainer.datamodule, "task_index"):
            trainer.datamodule.task_index = self.task_index


def finish_task(trainer: Trainer, pl_module: LightningModule) -> None:
    """End the running task for every callback that wants to know, and for the module if it does. Collective.

    A buffer of the module's own is there for what callbacks do, and weights are those that they leave for the rest.
    """
    for part in (getattr(pl_module, "replay", None), *trainer.callbacks):
        if isinstance(part, TaskAware):
            part.finish_task(trainer, pl_module)
    of_module: Any = getattr(pl_module, "finish_task", None)
    if of_module is not None:
        of_module(trainer, pl_module)
