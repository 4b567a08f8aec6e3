"""Sequential training on tasks: a trainer, a fit and a checkpoint for each, and a way to go on where it was cut off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.continual.task_boundary import finish_task
from lightning_collapse.callbacks.monitors.plasticity_monitor import PlasticityMonitor
from lightning_collapse.utilities.random_states import random_states, restore_random_states
from lightning_collapse.utilities.trainer import hands_back_weights_only
from lightning_collapse.utilities.twin_packages import is_kind

KEY = "lightning_collapse.fit_tasks"


def fit_tasks(
    make_trainer: Callable[..., Trainer],
    model: LightningModule,
    tasks: Sequence[Any],
    *,
    directory: str | Path | None = None,
) -> Trainer:
    """Fit a module to one task after the other, with a fresh ``Trainer`` for each.

    A trainer that is used again trains nothing: it has reached its last epoch. The module and the callbacks go on. Of
    the callbacks those that act when a task ends (:class:`~lightning_collapse.TaskAware`), and
    :class:`~lightning_collapse.PlasticityMonitor`, which measures from where the first began, carry state from task to
    task: either ``make_trainer`` puts the same objects into every trainer, or new ones of the same ``state_key`` get
    the state of the old ones. All others start afresh if they are new, such as an ``EarlyStopping``.

    With a ``directory`` the whole state is saved as ``task{t}.ckpt`` after task ``t`` has ended and callbacks have
    learned from it; a ``ModelCheckpoint`` saves before that. Called again with a directory that has such files, tasks
    that are done are skipped: weights, buffers, the callbacks that carry state and random states are those after the
    last of them. A task that was cut off goes on from its newest ``last*.ckpt`` in the same directory or below, that of
    a ``ModelCheckpoint(dirpath=directory, save_last=True)`` which ``make_trainer`` puts into the trainer; without one
    it starts anew. Checkpoints of an end of an epoch give what an uninterrupted sequence gives, bit by bit. All are
    read with ``weights_only=True``.

    Every process must see the directory. A module that is built in ``configure_model`` can be trained here, but not
    taken up again from a finished task.

    Args:
        make_trainer: Returns a new trainer; called with the index of the task if it takes an argument.
        model: The module.
        tasks: For every task a ``LightningDataModule``, a pair ``(train, val)`` of loaders as a tuple, or what
            ``Trainer.fit`` takes as ``train_dataloaders``.
        directory: Where checkpoints are.

    Returns:
        The trainer of the last task.

    Raises:
        ValueError: If there are no tasks, or ``make_trainer`` is no function.
        MisconfigurationException: If ``make_trainer`` returns a trainer twice, one that is no ``Trainer``, or one that
            spawns processes, whose callbacks are lost when they end.

    Example::

        metrics = ContinualMetrics(test_loaders)
        fit_tasks(lambda: Trainer(max_epochs=5, callbacks=[metrics]), model, train_loaders, directory="runs/digits")
    """
    if not callable(make_trainer):
        raise ValueError(f"`make_trainer` takes a function that returns a `Trainer`, got {make_trainer!r}.")
    tasks = list(tasks)
    if not tasks:
        raise ValueError("`tasks` is empty. Pass a data module or a loader per task.")
    folder = None if directory is None else Path(directory)
    done = _finished(folder, len(tasks))
    states: Mapping[str, Any] = {}
    if done:
        assert folder is not None
        rank_zero_info(f"`fit_tasks` goes on after task {done - 1}, whose end is in {str(folder)!r}.")
        checkpoint = _load(_path(folder, done - 1))
        states = checkpoint.get("callbacks", {})
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
        restore_random_states(checkpoint[KEY]["random"])
    if done == len(tasks):
        trainer = _make(make_trainer, done - 1, [])
        _give(trainer, [], states)
        return trainer
    trainers: list[Trainer] = []
    for index in range(done, len(tasks)):
        trainer = _make(make_trainer, index, trainers)
        begun, random = _begun(folder, index) if index == done else (None, None)
        old = _carrying(trainers[-1]) if trainers else []
        keeper = _Keeper(index, old, states, random, None if folder is None else _path(folder, index))
        trainer.callbacks.insert(0, keeper)  # before all that it gives a state to
        trainer.fit(model, **_data(tasks[index]), ckpt_path=begun)
        trainer.callbacks.remove(keeper)
        states = {}
        trainers = [trainer]
    return trainer


class _Keeper(Callback):
    """Gives callbacks the state of those before, and has checkpoints know the task they are of."""

    def __init__(
        self,
        task: int,
        old: Sequence[Callback],
        states: Mapping[str, Any],
        random: Any,
        path: Path | None,
    ) -> None:
        self.task, self.old, self.states, self.random, self.path = task, old, states, random, path
        self._trains = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # the callbacks of the module's own `configure_callbacks` are there now
            _give(trainer, self.old, self.states)
            self.old = ()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.random is not None:  # before the loader of the first epoch draws
            restore_random_states(self.random)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trains = True

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {"task": self.task, "random": random_states()}

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trains and self.random is not None:  # cut off between the last epoch and the end of the task
            restore_random_states(self.random)  # a loader has drawn, which nobody reads
            for callback in trainer.callbacks:
                if isinstance(callback, TaskAware):
                    callback._started = True
            finish_task(trainer, pl_module)
        if self.path is not None and not trainer.fast_dev_run:
            # here, where every process still is and shards can be gathered
            trainer.save_checkpoint(self.path, weights_only=False)


def _give(trainer: Trainer, old: Sequence[Callback], states: Mapping[str, Any]) -> None:
    """State of old callbacks, or saved state, to the callbacks that are not these."""
    new = _carrying(trainer)
    for callback in new:
        if any(callback is other for other in old):
            continue
        same = next((other for other in old if other.state_key == callback.state_key), None)
        state = states.get(callback.state_key) if same is None else same.state_dict()
        if state:
            callback.load_state_dict(deepcopy(state))
    keys = {callback.state_key for callback in new}
    lost = [other.state_key for other in old if other.state_key not in keys]
    if lost:
        rank_zero_warn(
            f"`fit_tasks`: the new trainer has no callback that takes the state of {', '.join(lost)} over."
            " Put the same callbacks into every trainer."
        )


def _carrying(trainer: Trainer) -> list[Callback]:
    """Callbacks whose state is that of the whole sequence."""
    return [callback for callback in trainer.callbacks if isinstance(callback, TaskAware | PlasticityMonitor)]


def _make(make_trainer: Callable[..., Trainer], index: int, used: Sequence[Trainer]) -> Trainer:
    try:
        signature(make_trainer).bind(index)
    except TypeError:
        trainer = make_trainer()
    else:
        trainer = make_trainer(index)
    if not is_kind(trainer, Trainer):
        raise MisconfigurationException(f"`make_trainer` must return a `Trainer`, got {trainer!r}.")
    if any(trainer is other for other in used):
        raise MisconfigurationException(
            "`make_trainer` returned the same `Trainer` twice, which would train nothing the second time. Make a new"
            " one every time: `lambda: Trainer(...)`."
        )
    if hands_back_weights_only(trainer):
        raise MisconfigurationException(
            "`fit_tasks` cannot go on after a strategy that spawns processes: what callbacks have learned is lost with"
            " them. Use `strategy='ddp'`."
        )
    return trainer


def _data(task: Any) -> dict[str, Any]:
    if is_kind(task, LightningDataModule):
        return {"datamodule": task}
    if isinstance(task, tuple) and len(task) == 2:
        return {"train_dataloaders": task[0], "val_dataloaders": task[1]}
    return {"train_dataloaders": task}


def _path(folder: Path, task: int) -> Path:
    return folder / f"task{task}.ckpt"


def _finished(folder: Path | None, tasks: int) -> int:
    """How many tasks, from the first on without a gap, have left a checkpoint."""
    if folder is None:
        return 0
    return next((task for task in range(tasks) if not _path(folder, task).exists()), tasks)


def _begun(folder: Path | None, task: int) -> tuple[str | None, Any]:
    """The newest checkpoint from within a task, and its random states."""
    found = [] if folder is None else sorted(folder.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    for path in reversed(found):
        entry = _load(path).get(KEY)
        if entry is not None and entry["task"] == task:
            return str(path), entry["random"]
    return None, None


def _load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint
