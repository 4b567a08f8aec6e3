"""End of a task: what every callback shares that acts on it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.copies import checksum
from lightning_collapse.utilities.optimizers import evaluation_weights, keeps_own_weights
from lightning_collapse.utilities.trainer import without_module
from lightning_collapse.utilities.training_step import wrap_method


class TaskAware(Callback, ABC):
    """Acts when a task ends: at the end of a fit, or where a :class:`~lightning_collapse.TaskBoundary` says so.

    A task ends once: a fit that trained nothing since, or that was interrupted, ends none. One object goes through all
    tasks, from one ``Trainer`` to the next; its state says how many have ended.

    The end of a fit comes after ``on_train_end`` of every callback and of the module, where averages of weights take
    their place; optimizers that train other weights than they hand over, such as schedule-free ones, are in eval mode
    meanwhile. If the weights that the fit leaves are others still, there is a warning. What :meth:`end_task` raises is
    a warning, too. A copy or a pickle that is made during a fit has what was learned, and nothing of the fit.

    Attributes:
        task_index: Index of the running task, from 0.
        changes_weights: Whether it changes weights when a task ends and keeps no account of them, so that others may
            change them after it. An optimizer that trains other weights than it hands over is refused then.
        reads_weights: Whether what it does when a task ends depends on weights, so that none may change after it.

    Example::

        class Announce(TaskAware):
            def end_task(self, trainer, pl_module):
                print(f"task {self.task_index} has ended")

        trainer = Trainer(callbacks=[Announce()])
    """

    changes_weights: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    def __init__(self) -> None:
        self.task_index = 0
        self.containment = Containment(type(self).__name__)
        self._trained = False
        self._started = False
        self._learned: dict[str, int] | None = None  # checksums of the weights when the latest task ended
        self._unwrap: Callable[[], None] = _nothing

    def __getstate__(self) -> dict[str, Any]:
        return without_module(self) | self._without_fit()

    def _without_fit(self) -> dict[str, Any]:
        """What is of a running fit alone, its module and its hooks, as it is where none runs."""
        return {"_learned": None, "_unwrap": _nothing}

    @abstractmethod
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The task of index ``task_index`` has ended. Collective: called on every process."""

    def finish_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the task, if it was trained at all."""
        if not self._trained:
            return
        place = f"the end of task {self.task_index}"
        with self.containment(place, "it is left out"), evaluation_weights(trainer.optimizers):
            self.end_task(trainer, pl_module)
            self._learned = checksum(pl_module) if self.reads_weights and not self.changes_weights else None
        self._trained = False
        self.task_index += 1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = False
        self._learned = None
        own = [type(optimizer).__name__ for optimizer in trainer.optimizers if keeps_own_weights(optimizer)]
        if own and self.changes_weights:
            raise MisconfigurationException(
                f"`{type(self).__name__}` changes weights when a task ends, and {own[0]} brings back those that it"
                " keeps itself. Take an optimizer without `train()` and `eval()`."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained = True
        self._learned = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:
            self._unwrap = after_hook(pl_module, "on_train_end", lambda: self.finish_task(trainer, pl_module))

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
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unwrap()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwrap()
        self._unwrap = _nothing  # what it held on to cannot be pickled
        with self.containment("comparing the weights at the end of a task with those that the fit leaves"):
            self._compare(pl_module)
        self._learned = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"task": self.task_index, "trained": self._trained}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.task_index, self._trained = state_dict["task"], state_dict["trained"]

    def _compare(self, pl_module: LightningModule) -> None:
        if self._learned is None:
            return
        now = checksum(pl_module)
        changed = [name for name, number in self._learned.items() if now.get(name, number) != number]
        if changed:
            rank_zero_warn(
                f"`{type(self).__name__}`: the weights that the fit leaves are not those that task"
                f" {self.task_index - 1} has ended with: {changed[0]} and {len(changed) - 1} others have changed since."
                " Put final weights in place, and optimizers into eval mode, in `on_train_end`."
            )


def after_hook(pl_module: LightningModule, hook: str, then: Callable[[], None]) -> Callable[[], None]:
    """Do something once a hook of the module, which comes after those of callbacks, has run the next time.

    Returns:
        A function that gives it up.
    """

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        unwrap()
        result = inner(*args, **kwargs)
        then()
        return result

    unwrap = wrap_method(pl_module, hook, around)
    return unwrap


def _nothing() -> None:
    pass
