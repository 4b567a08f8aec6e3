"""Weight regularization as a mixin: penalties on weights as a part of a ``LightningModule``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_collapse.callbacks.loss_terms.weight_penalty import WeightPenalty
from lightning_collapse.mixins.bases import check_order
from lightning_collapse.penalties.base import Penalty
from lightning_collapse.penalties.ewc import EWC

STATE = "weight_penalties"
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
    """Gives a ``LightningModule`` penalties on its weights; put it before ``LightningModule`` in the bases.

    Does what :class:`~lightning_collapse.WeightPenalty` does, bit by bit, from inside the module: what the penalties
    remember is in the module's own checkpoints, under a key of its own beside the ``state_dict``, so that
    ``load_from_checkpoint`` brings it back too. A module with hooks of its own calls ``super()`` in them; one that
    does not gets a warning when its class is made.

    Attributes:
        weight_penalties: :class:`~lightning_collapse.WeightPenalty` by name, set by :meth:`set_penalties`.

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
            if type(self) is cls and not self._trainer_now().fast_dev_run:
                self.finish_task(self._trainer_now(), self)

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

    def finish_task(self, trainer: Trainer, pl_module: Any) -> None:
        """End the task for every penalty, if it was trained at all; see :class:`~lightning_collapse.TaskBoundary`."""
        for penalty in self._penalties():
            penalty.finish_task(trainer, pl_module)

    def on_fit_start(self) -> None:
        """Check the set-up."""
        super().on_fit_start()  # type: ignore[misc]
        for penalty in self._penalties():
            penalty.on_fit_start(self._trainer_now(), self)  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        """Meet the parameters."""
        super().on_train_start()  # type: ignore[misc]
        for penalty in self._penalties():
            penalty.on_train_start(self._trainer_now(), self)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Try on the first batch whether the task can be learned when it ends."""
        result: int | None = super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]
        for penalty in self._penalties():
            penalty.on_train_batch_start(self._trainer_now(), self, batch, batch_idx)  # type: ignore[arg-type]
        return result

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Add the gradients of the penalties."""
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        for penalty in self._penalties():
            penalty.on_before_optimizer_step(self._trainer_now(), self, optimizer)  # type: ignore[arg-type]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See where the step has led, and publish curves."""
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]
        for penalty in self._penalties():
            penalty.on_train_batch_end(self._trainer_now(), self, outputs, batch, batch_idx)  # type: ignore[arg-type]

    def on_train_end(self) -> None:
        """What other bases do; then the task ends, see :meth:`finish_task`."""
        super().on_train_end()  # type: ignore[misc]

    def on_fit_end(self) -> None:
        """Say so if nothing was trained."""
        super().on_fit_end()  # type: ignore[misc]
        for penalty in self._penalties():
            penalty.on_fit_end(self._trainer_now(), self)  # type: ignore[arg-type]

    def teardown(self, stage: str) -> None:
        """Let go of the fit."""
        super().teardown(stage)  # type: ignore[misc]
        for penalty in self._penalties():
            penalty.teardown(self._trainer_now(), self, stage)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the penalties remember."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint[STATE] = {penalty.name: penalty.state_dict() for penalty in self._penalties()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give it back to the penalties of the same names."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        states = checkpoint.get(STATE, {})
        for penalty in self._penalties():
            if penalty.name in states:
                penalty.load_state_dict(states[penalty.name])

    def _penalties(self) -> list[WeightPenalty]:
        return list(getattr(self, "weight_penalties", {}).values())

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
