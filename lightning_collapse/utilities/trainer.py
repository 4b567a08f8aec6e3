"""What we must know of a running trainer and Lightning does not say in public: the only file that looks inside one."""

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def logging_step(trainer: Trainer) -> int:
    """The x-axis of Lightning's own curves: optimizer steps, counted once for several optimizers."""
    step: int = _epoch_loop(trainer)._batches_that_stepped
    return step


def ends_step(trainer: Trainer) -> bool:
    """Whether the running training batch is the last of its accumulation window (the epoch's odd last one too)."""
    return not _epoch_loop(trainer)._should_accumulate()


def batches_until(trainer: Trainer, every_n_steps: int) -> int:
    """Training batches from the running one to the next point of a cadence; 0 if the running one ends in a point.

    An epoch that ends inside an accumulation window brings the point earlier than this says.
    """
    steps = -(logging_step(trainer) + 1) % every_n_steps
    accumulate = trainer.accumulate_grad_batches
    if ends_step(trainer):
        return steps * accumulate
    left: int = -_epoch_loop(trainer).batch_progress.current.ready % accumulate
    return steps * accumulate + left


def is_due(trainer: Trainer, every_n_steps: int) -> bool:
    """Whether the running training batch ends in a point of a cadence; at the same steps as Lightning's own curves."""
    return every_n_steps > 0 and (logging_step(trainer) + 1) % every_n_steps == 0 and ends_step(trainer)


def loss_scale(trainer: Trainer, optimizer: Optimizer | None = None) -> Tensor | None:
    """Factor that gradients carry for the sake of 16-bit training, where it lies: nothing waits for the device.

    Args:
        trainer: Whose gradients.
        optimizer: ``None`` asks right after a backward pass; with an optimizer it is what its gradients carry when
            ``on_before_optimizer_step`` is called: nothing, unless it takes the factor out itself, as fused ones do.

    Returns:
        0-dimensional, or ``None`` where gradients are as they are.
    """
    if optimizer is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # `GradScaler.get_scale` would wait for the device
    return getattr(scaler, "_scale", None) if scaler is not None and scaler.is_enabled() else None


def synchronizes_last(trainer: Trainer) -> bool:
    """Whether processes accumulate gradients each on its own until the last micro-batch of a step."""
    return isinstance(trainer.model, DistributedDataParallel)


def _epoch_loop(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop
