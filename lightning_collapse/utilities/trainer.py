"""What we must know of a running trainer and Lightning does not say in public: the only file that looks inside one."""

from typing import Any

from lightning.pytorch import Trainer


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


def _epoch_loop(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop
