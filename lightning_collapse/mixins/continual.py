"""Continual learning as a mixin: penalties on weights and a replay buffer as parts of a ``LightningModule``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_collapse.callbacks.continual.replay import Replay, gather_buffers, rehearsal_batch
from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.continual.task_boundary import finish_task
from lightning_collapse.callbacks.loss_terms.weight_penalty import WeightPenalty
from lightning_collapse.mixins.bases import check_order
from lightning_collapse.penalties.base import Penalty
from lightning_collapse.penalties.ewc import EWC
from lightning_collapse.replay.replay_buffer import ReplayBuffer
from lightning_collapse.utilities.arguments import require_whole

STATE = "weight_penalties"
ROWS = "replay"
HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_fit_end",
    "on_save_checkpoint",
    "on_load_checkpoint",
)


class ContinualMixin:
    """Gives a ``LightningModule`` penalties on its weights and rehearsal; put it before ``LightningModule``.

    Does what :class:`~lightning_collapse.WeightPenalty` does, bit by bit, from inside the module: what the penalties
    remember is in the module's own checkpoints, under a key of its own beside the ``state_dict``, so that
    ``load_from_checkpoint`` brings it back too. A module with hooks of its own calls ``super()`` in them; one that
    does not gets a warning when its class is made.

    Attributes:
        weight_penalties: :class:`~lightning_collapse.WeightPenalty` by name, set by :meth:`set_penalties`.
        replay: The :class:`~lightning_collapse.Replay` that keeps rows, set by :meth:`set_replay`.

    Raises:
        TypeError: When a class is made, if the mixin stands behind ``LightningModule``.

    Example::

        class LitClassifier(ContinualMixin, LightningModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(6, 3)
                self.set_penalties({"ewc": EWC(weight=100.0)})
    """

    weight_penalties: dict[str, WeightPenalty]
    replay: Replay

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_order(cls, ContinualMixin)
        silenced = [name for name in HOOKS if _is_silenced(cls, name)]
        if silenced:
            rank_zero_warn(
                f"`{cls.__name__}` overrides {', '.join(f'`{name}`' for name in silenced)} without a call of"
                " `super()`, and its penalties depend on it. Add the call."
            )
        own = vars(cls).get("on_train_end")

        @wraps(cls.on_train_end)
        def on_train_end(self: ContinualMixin) -> None:
            # tasks end after all that the module does itself, which may put other weights in place
            own(self) if own else super(cls, self).on_train_end()  # type: ignore[misc]
            trainer = self._trainer_now()
            if type(self) is cls and not trainer.fast_dev_run:
                finish_task(trainer, self)  # type: ignore[arg-type]  # callbacks that change weights go first

        cls.on_train_end = on_train_end  # type: ignore[method-assign]

    def set_penalties(self, penalties: Mapping[str, Penalty | WeightPenalty]) -> None:
        """Choose the penalties; call it in ``__init__``, after ``super().__init__()``.

        Args:
            penalties: A penalty by name; or a :class:`~lightning_collapse.WeightPenalty`, to say which parameters it
                is for or which data it reads, whose name is then that of the entry.

        Raises:
            ValueError: If an entry is neither.
        """
        chosen: dict[str, WeightPenalty] = {}
        for name, entry in penalties.items():
            chosen[name] = entry if isinstance(entry, WeightPenalty) else WeightPenalty(entry)
            chosen[name].name = name
        self.weight_penalties = chosen

    def set_replay(self, replay: ReplayBuffer | Replay) -> None:
        """Choose what is rehearsed; call it in ``__init__``, after ``super().__init__()``.

        Args:
            replay: A buffer, which is offered the rows of every training batch, for :meth:`replay_batch`; or a
                :class:`~lightning_collapse.Replay`, to say what is kept, or to have it add to every batch.

        Raises:
            ValueError: If it is neither.
        """
        self.replay = replay if isinstance(replay, Replay) else Replay(replay, batch_size=0)

    def replay_batch(self, n: int | None = None) -> Any:
        """A rehearsal batch, on the device of the module; ``None`` in the first task, and where there are no rows.

        Of its own accord nothing is rehearsed: call it in ``training_step`` and add a loss on what it returns.

        Args:
            n: How many rows; ``None`` for as many as the running training batch has.

        Raises:
            ValueError: If ``n`` is no number of rows.
            MisconfigurationException: If there is no buffer.

        Example::

            def training_step(self, batch, batch_idx):
                loss = self.loss(batch)
                rehearsal = self.replay_batch()
                return loss if rehearsal is None else loss + self.loss(rehearsal)
        """
        replay = self._replay()
        if replay is None:
            raise MisconfigurationException(
                f"`{type(self).__name__}` has no replay buffer. Call `self.set_replay(ReplayBuffer(size=...))` in its"
                " `__init__`."
            )
        if n is not None:
            require_whole(1, n=n)
        if not (replay.task_index or replay.from_start):
            return None
        return rehearsal_batch(self._trainer_now(), replay.buffer, replay.rows_of_batch if n is None else n)

    def finish_task(self, trainer: Trainer, pl_module: Any) -> None:
        """End the task for all parts, if it was trained at all; see :class:`~lightning_collapse.TaskBoundary`."""
        for part in self._parts():
            part.finish_task(trainer, pl_module)

    def on_fit_start(self) -> None:
        """Check the set-up."""
        super().on_fit_start()  # type: ignore[misc]
        for part in self._parts():
            part.on_fit_start(self._trainer_now(), self)  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        """Meet the parameters."""
        super().on_train_start()  # type: ignore[misc]
        for part in self._parts():
            part.on_train_start(self._trainer_now(), self)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Try on the first batch whether the task can be learned when it ends."""
        result: int | None = super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]
        for part in self._parts():
            part.on_train_batch_start(self._trainer_now(), self, batch, batch_idx)  # type: ignore[arg-type]
        return result

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Add the gradients of the penalties."""
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        for part in self._parts():
            part.on_before_optimizer_step(self._trainer_now(), self, optimizer)  # type: ignore[arg-type]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See where the step has led, and publish curves."""
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]
        for part in self._parts():
            part.on_train_batch_end(self._trainer_now(), self, outputs, batch, batch_idx)  # type: ignore[arg-type]

    def on_train_end(self) -> None:
        """What other bases do; then the task ends, see :meth:`finish_task`."""
        super().on_train_end()  # type: ignore[misc]

    def on_fit_end(self) -> None:
        """Say so if nothing was trained."""
        super().on_fit_end()  # type: ignore[misc]
        for part in self._parts():
            part.on_fit_end(self._trainer_now(), self)  # type: ignore[arg-type]

    def teardown(self, stage: str) -> None:
        """Let go of the fit."""
        super().teardown(stage)  # type: ignore[misc]
        for part in self._parts():
            part.teardown(self._trainer_now(), self, stage)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the penalties remember, and the rows of the buffer."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint[STATE] = {penalty.name: penalty.state_dict() for penalty in self._penalties()}
        if replay := self._replay():
            checkpoint[ROWS] = gather_buffers(replay.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give it back to the penalties of the same names, and to the buffer."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        states = checkpoint.get(STATE, {})
        for penalty in self._penalties():
            if penalty.name in states:
                penalty.load_state_dict(states[penalty.name])
        if (replay := self._replay()) and ROWS in checkpoint:
            replay.load_state_dict(checkpoint[ROWS])

    def _penalties(self) -> list[WeightPenalty]:
        return list(getattr(self, "weight_penalties", {}).values())

    def _replay(self) -> Replay | None:
        return getattr(self, "replay", None) or None

    def _parts(self) -> list[TaskAware]:
        return [*self._penalties(), *filter(None, [self._replay()])]

    def _trainer_now(self) -> Trainer:
        trainer: Trainer = self.trainer
        return trainer


def _is_silenced(cls: type, hook: str) -> bool:
    """Whether a class before the mixin has the hook, and its code does not name the hook to pass it on."""
    before = cls.__mro__[: cls.__mro__.index(ContinualMixin)]
    own = [inspect.unwrap(vars(base)[hook]) for base in before if hook in vars(base)]
    return any(hook not in getattr(getattr(method, "__code__", None), "co_names", (hook,)) for method in own)


class EWCMixin(ContinualMixin):
    """A module with elastic weight consolidation, :class:`~lightning_collapse.penalties.EWC` at its defaults.

    Call ``self.set_penalties({"ewc": EWC(weight=...)})`` after ``super().__init__()`` for others.

    Example::

        class LitClassifier(EWCMixin, LightningModule): ...
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_penalties({"ewc": EWC()})
