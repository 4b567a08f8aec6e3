"""Rollback: return to the last healthy state of training, at a lower learning rate."""

import os
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_collapse.callbacks.guard.action import Action, checkpoint_folder
from lightning_collapse.callbacks.guard.training_health import weights_are_finite
from lightning_collapse.callbacks.guard.training_state import Undo, apply, capture, describe, difference
from lightning_collapse.rules import Judgement
from lightning_collapse.utilities.private_torch import nested_schedulers, scheduler_rates
from lightning_collapse.utilities.trainer import load_own_checkpoint, logging_step, save_state


class Rollback(Action):
    """Action of ``CollapseGuard``: restore the last healthy state, lower the learning rate.

    At points where no rule sees anything it saves the state of training, in one file that is written over. At a verdict
    it brings back what that file holds of weights, buffers, optimizers, learning-rate schedulers, the gradient scaler,
    the running statistics of regularizers and the copies of callbacks that average weights (``WeightAveraging``, EMA,
    SWA), and multiplies every learning rate by ``factor``. The weights are those that are trained, whatever other
    callbacks put into checkpoints. The fit goes on from there with new data: its step count, the position in the data,
    other callbacks and the state of random number generators are not turned back.

    All of it comes back, or nothing, with a warning: if the present training has other weights, parameter groups,
    schedulers or averages than the saved one, as after a backbone was unfrozen, or if one of them cannot be loaded.

    Args:
        factor: What every learning rate is multiplied by, once more at each return to the same state.
        every_n_steps: Optimizer steps that lie between two saves at least.
        times: How often; the fit is stopped instead of one more time.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        guard = CollapseGuard(action=["warn", Rollback(factor=0.5)])
        trainer = Trainer(callbacks=[SpectralAlignmentMonitor(), guard])
    """

    goes_on = True

    def __init__(self, factor: float = 0.5, every_n_steps: int = 500, times: int = 3) -> None:
        if not 0 < factor <= 1:
            raise ValueError(f"`factor` multiplies the learning rate and must lie in (0, 1], got {factor}.")
        for name, number in (("every_n_steps", every_n_steps), ("times", times)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        self.factor = factor
        self.every_n_steps = every_n_steps
        self.times = times
        self._dirpath: str | None = None
        self._path = ""
        self._step = -1
        self._returns = 0  # in all
        self._here = 0  # to this state
        self._description: dict[str, Any] = {}

    def check(self, others: Sequence[Action], kinds: Sequence[str]) -> None:
        """Refuse another one."""
        if same := sum(isinstance(other, Rollback) for other in others):
            raise ValueError(f"`action` has {same + 1} `Rollback`s, which would undo each other. Keep one.")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {
            "path": self._path,
            "step": self._step,
            "returns": self._returns,
            "here": self._here,
            "description": self._description,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self._path, self._step = state_dict["path"], state_dict["step"]
        self._returns, self._here = state_dict["returns"], state_dict["here"]
        self._description = state_dict["description"]

    def attach(self, trainer: Trainer, pl_module: LightningModule, dirpath: str | None) -> None:
        """Note where to save."""
        self._dirpath = dirpath

    def on_points(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> None:
        """Save where all is well. Collective."""
        if judgement.healthy:
            self.remember(trainer, pl_module, logging_step(trainer), checkpoint_folder(trainer, self._dirpath))

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> bool | None:
        """Return. Collective."""
        return self.restore(trainer, pl_module, judgement.step)

    def remember(self, trainer: Trainer, pl_module: LightningModule, step: int, folder: str) -> None:
        """Save this healthy state, if the last one is old enough or of no use any more. Collective."""
        if trainer.fast_dev_run:
            return
        description = describe(trainer)
        if self._path and step - self._step < self.every_n_steps and description == self._description:
            return
        if not weights_are_finite(trainer, pl_module):  # whatever the rules say: their layers need not have run since
            return
        # runs may share a folder
        path = self._path or os.path.join(folder, f"healthy-{trainer.strategy.broadcast(uuid4().hex[:8])}.ckpt")
        if save_state(trainer, lambda: capture(trainer), path, "Rollback"):
            self._path, self._step, self._here, self._description = path, step, 0, description

    def restore(self, trainer: Trainer, pl_module: LightningModule, step: int) -> bool:
        """Return to the last healthy state, and say whether that was possible. Collective."""
        if self._returns >= self.times:
            rank_zero_warn(f"`Rollback` has returned {self.times} times, and stops the fit at step {step} instead.")
            trainer.should_stop = True
            return False
        if not self._path:
            rank_zero_warn(f"`Rollback` has no healthy state to return to at step {step}: no point was healthy yet.")
            return False
        if changed := difference(self._description, describe(trainer)):
            rank_zero_warn(f"`Rollback` returns to nothing at step {step}: since step {self._step} the {changed}.")
            return False
        if not self._bring_back(trainer):
            return False
        self._returns += 1
        self._here += 1
        _scale_learning_rates(trainer, self.factor**self._here)
        rank_zero_warn(
            f"`Rollback` at step {step}: weights, optimizers and schedulers are those of step {self._step} again, the"
            f" learning rates {self.factor**self._here:g} times what they were then."
        )
        return True

    def _bring_back(self, trainer: Trainer) -> bool:
        """Load the saved state whole; if a process cannot, all are as they were before. Collective."""
        undo, problem = Undo(trainer), ""
        try:
            state = load_own_checkpoint(trainer, self._path)  # we have written it: it may hold objects of any class
        except Exception as error:  # cleaned up, a lost disk: the run must not end now
            problem = f"`Rollback` cannot read {self._path!r} and returns to nothing: {error!r:.400}"
        if trainer.strategy.reduce_boolean_decision(not problem):
            try:
                apply(trainer, state)
            except Exception as error:
                problem = f"`Rollback` cannot bring back {self._path!r}, and all is as before: {error!r:.400}"
            if trainer.strategy.reduce_boolean_decision(not problem):
                return True
        undo()
        rank_zero_warn(problem or f"`Rollback` returns to nothing: another process cannot use {self._path!r}.")
        return False


def _scale_learning_rates(trainer: Trainer, factor: float) -> None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # the latter of schedulers that cycle
                if name in group:
                    group[name] = _scaled(group[name], factor)
    for config in trainer.lr_scheduler_configs:
        for scheduler in _nested(config.scheduler):
            for name in scheduler_rates(scheduler):
                if isinstance(rates := getattr(scheduler, name, None), list):
                    setattr(scheduler, name, [_scaled(rate, factor) for rate in rates])


def _nested(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those it is made of."""
    yield scheduler
    for inner in nested_schedulers(scheduler):
        yield from _nested(inner)


@torch.no_grad()
def _scaled(rate: Any, factor: float) -> Any:
    return rate.mul_(factor) if isinstance(rate, Tensor) else rate * factor
