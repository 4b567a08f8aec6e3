"""Back to where all was well, at a lower learning rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_collapse.callbacks.loss_terms.regularizer import Regularizer
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.sharding import local
from lightning_collapse.utilities.trainer import load_own_checkpoint, save_checkpoint


class Rollback:
    """Action of :class:`~lightning_collapse.CollapseGuard`: restore the last healthy state, lower the learning rate.

    At points where no rule sees anything it keeps a checkpoint, one file that is written over. When a verdict falls it
    brings back what that checkpoint holds of weights, buffers, optimizers, learning-rate schedulers, the gradient
    scaler and the memory of regularizers, and multiplies every learning rate by ``factor``. The fit goes on from there
    with new data: its step count, the position in the data, other callbacks and the state of random number generators
    are not turned back.

    Args:
        factor: What every learning rate is multiplied by, once more at each return to the same checkpoint.
        every_n_steps: Optimizer steps that lie between two of its checkpoints at least.
        times: How often; the fit is stopped instead of one more time.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        guard = CollapseGuard(action=["warn", Rollback(factor=0.5)])
        trainer = Trainer(callbacks=[SpectralAlignmentMonitor(), guard])
    """

    def __init__(self, factor: float = 0.5, every_n_steps: int = 500, times: int = 3) -> None:
        if not 0 < factor <= 1:
            raise ValueError(f"`factor` multiplies the learning rate and must lie in (0, 1], got {factor}.")
        for name, number in (("every_n_steps", every_n_steps), ("times", times)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        self.factor = factor
        self.every_n_steps = every_n_steps
        self.times = times
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new fit begins."""
        self._path = ""
        self._step = -1
        self._returns = 0  # in all
        self._here = 0  # to this checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {"path": self._path, "step": self._step, "returns": self._returns, "here": self._here}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self._path, self._step = state_dict["path"], state_dict["step"]
        self._returns, self._here = state_dict["returns"], state_dict["here"]

    def remember(self, trainer: Trainer, pl_module: LightningModule, step: int, folder: str) -> None:
        """Keep this healthy state, if the last one is old enough. Collective."""
        if trainer.fast_dev_run or (self._path and step - self._step < self.every_n_steps):
            return
        if not _all_finite(trainer, pl_module):  # whatever the rules say: their layers need not have run since
            return
        # runs may share a folder
        path = self._path or os.path.join(folder, f"healthy-{trainer.strategy.broadcast(uuid4().hex[:8])}.ckpt")
        if save_checkpoint(trainer, path, "Rollback"):
            self._path, self._step, self._here = path, step, 0

    def restore(self, trainer: Trainer, pl_module: LightningModule, step: int) -> bool:
        """Return to the last healthy state, and say whether that was possible. Collective."""
        if self._returns >= self.times:
            rank_zero_warn(f"`Rollback` has returned {self.times} times, and stops the fit at step {step} instead.")
            trainer.should_stop = True
            return False
        if not self._path:
            rank_zero_warn(f"`Rollback` has no healthy state to return to at step {step}: no point was healthy yet.")
            return False
        checkpoint = self._load(trainer)
        if checkpoint is None:
            return False
        pl_module.on_load_checkpoint(checkpoint)
        trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
            config.scheduler.load_state_dict(state)
        for callback in trainer.callbacks:
            if isinstance(callback, Regularizer):  # a running covariance may hold what went wrong
                callback.load_state_dict(checkpoint.get("callbacks", {}).get(callback.state_key, {}))
        precision = trainer.precision_plugin
        if type(precision).__qualname__ in checkpoint:
            precision.load_state_dict(checkpoint[type(precision).__qualname__])
        self._returns += 1
        self._here += 1
        _scale_learning_rates(trainer, self.factor**self._here)
        rank_zero_warn(
            f"`Rollback` at step {step}: weights, optimizers and schedulers are those of step {self._step} again, the"
            f" learning rates {self.factor**self._here:g} times what they were then."
        )
        return True

    def _load(self, trainer: Trainer) -> dict[str, Any] | None:
        """What the checkpoint holds, ``None`` on every process if one cannot read it. Collective."""
        checkpoint, problem = None, ""
        try:
            # we have written it: hyperparameters may be objects of any class
            checkpoint = load_own_checkpoint(trainer, self._path)
        except Exception as error:  # cleaned up, a lost disk: the run must not end now
            problem = f"`Rollback` cannot read {self._path!r} and returns to nothing: {error!r:.400}"
        if trainer.strategy.reduce_boolean_decision(not problem):
            return checkpoint
        rank_zero_warn(problem or f"`Rollback` returns to nothing: another process cannot read {self._path!r}.")
        return None


def _all_finite(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether no weight is NaN or infinite. Collective; waits for the device once, right before a checkpoint does."""
    parts = [local(p) for p in pl_module.parameters()]
    # a sum is finite if and only if its terms are
    sums = [p.detach().sum(dtype=accumulation_dtype(p.device)) for p in parts if p.is_floating_point()]
    total = torch.stack([one.to(pl_module.device) for one in sums]).sum() if sums else torch.zeros(())
    return trainer.strategy.reduce_boolean_decision(bool(total.isfinite()))


def _scale_learning_rates(trainer: Trainer, factor: float) -> None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # the latter of schedulers that cycle
                if name in group:
                    group[name] = _scaled(group[name], factor)
    for config in trainer.lr_scheduler_configs:
        for scheduler in _nested(config.scheduler):
            for name in ("base_lrs", "max_lrs", "_last_lr"):
                if isinstance(rates := getattr(scheduler, name, None), list):
                    setattr(scheduler, name, [_scaled(rate, factor) for rate in rates])


def _nested(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those it is made of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _nested(inner)


@torch.no_grad()
def _scaled(rate: Any, factor: float) -> Any:
    return rate.mul_(factor) if isinstance(rate, Tensor) else rate * factor
