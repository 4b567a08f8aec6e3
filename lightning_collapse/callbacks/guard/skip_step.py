"""Skip step: the update of a step whose loss or gradient norm is a burst, or not finite, is not made."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_collapse.callbacks.guard.action import Action
from lightning_collapse.callbacks.guard.skipped_updates import SkippedUpdates
from lightning_collapse.callbacks.monitors.stability_monitor import StabilityMonitor
from lightning_collapse.rules import Judgement
from lightning_collapse.utilities.sharding import local
from lightning_collapse.utilities.skippable_step import Decision


class SkipStep(Action):
    """Action of ``CollapseGuard``: leave out the update of a step that ``StabilityMonitor`` flags.

    Flagged is a step whose loss or gradient norm is not finite, or lies so far above the 128 accepted steps before it
    as ``StabilityMonitor(threshold=6)`` says. There is one decision for each optimizer step: loss and norm are means
    over all processes and accumulated batches, before clipping, so that every process decides the same. Flagged steps
    do not enter the window, so that one NaN costs one step; after ``StabilityMonitor(limit=8)`` bursts in a row the
    last of them is made, since the level is a new one, and steps are compared anew. A step that is not finite is never
    made. That steps are skipped too often, or a new level was accepted, is the verdict *skipped steps*
    (:class:`~lightning_collapse.rules.SkippedSteps`).

    Parameters, moments, step counters of the optimizer and averages of the weights (``WeightAveraging``,
    ``EMAWeightAveraging``, any ``AveragedModel``) are bit-equal to those of a run in which the step was not made. Not
    undone are the buffers of the forward pass (BatchNorm), random numbers, the position in the data, the trainer's
    count of steps and the learning-rate schedule, which goes on.

    Fused optimizers of torch (``AdamW(fused=True)``) are told on the device and nothing waits for it. For all others
    the flag is read once a step, which waits for the device: right before the update, when the gradients are there.
    Under a gradient scaler an infinite gradient is skipped by the scaler itself, and its scale is never touched.

    After ``SkipStepOptimizer`` of OLMo-core (Allen Institute for AI; code, no paper tells of it), which skips what lies
    6 standard deviations above the mean of the last 128: by a factor 0, through which NaN passes into the moments, and
    with NaN in the window, which skips the next 128 steps too. Robust scores, limit and exactness are ours.

    Raises:
        MisconfigurationException: When the fit starts, if there is no ``StabilityMonitor`` or it makes no points, for
            an optimizer that runs its closure several times in a step, as ``LBFGS`` does, and for DeepSpeed.

    Example::

        guard = CollapseGuard(action=["warn", SkipStep()])
        trainer = Trainer(callbacks=[StabilityMonitor(), guard])
    """

    def __init__(self) -> None:
        self._monitor: StabilityMonitor | None = None
        self._updates: SkippedUpdates | None = None
        self._flags: dict[int, Tensor] = {}
        self._averages: list[bool | None] = []
        self._skipped, self._has_warned = 0, False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {"averages": self._averages if self._updates is None else self._updates.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self._averages = state_dict["averages"]

    def attach(self, trainer: Trainer, pl_module: LightningModule, dirpath: str | None) -> None:
        """Be told of every step, and be asked before its update.

        Raises:
            MisconfigurationException: If there is nobody to tell, or an update cannot be left out.
        """
        self.detach()
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, StabilityMonitor)]
        if not any(monitor.cadence(trainer) for monitor in monitors):
            raise MisconfigurationException(
                "`SkipStep()` skips the steps that `StabilityMonitor` flags, and the trainer has none"
                + (
                    " that makes points. Write `StabilityMonitor(every_n_steps=50)`, or set `log_every_n_steps`."
                    if monitors
                    else ". Add `StabilityMonitor()` to its `callbacks`."
                )
            )
        self._updates = SkippedUpdates(trainer, self._decide, "SkipStep()", self._averages)
        self._monitor = next(monitor for monitor in monitors if monitor.cadence(trainer))
        self._monitor.on_flag.append(self._note)
        self._monitor.skips = True

    def on_points(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> None:
        """Say once if a step that was left out has left something behind; asks the device, after such a step alone."""
        skipped = 0 if self._monitor is None else self._monitor.skipped
        if skipped <= self._skipped:
            return
        self._skipped = skipped
        buffers = [name for name, buffer in pl_module.named_buffers() if buffer.is_floating_point()]
        if not self._has_warned and (bad := [name for name in buffers if not _is_finite(pl_module.get_buffer(name))]):
            self._has_warned = True
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            rank_zero_warn(
                f"`SkipStep` has left out an update before step {judgement.step}, but the forward pass of that step has"
                f" put NaN or infinity into the buffer `{bad[0]}`{more}, which evaluation reads. Bring it back from a"
                " checkpoint or with `Rollback()`, and look at the data."
            )

    def detach(self) -> None:
        """No longer be told or asked; may be called more than once."""
        if self._updates is not None:
            self._averages = self._updates.state_dict()
            self._updates.remove()
        if self._monitor is not None:
            self._monitor.on_flag.remove(self._note)
            self._monitor.skips = False
        self._updates, self._monitor = None, None
        self._flags.clear()

    def _note(self, trainer: Trainer, optimizer: Optimizer, flag: Tensor) -> None:
        self._flags[id(optimizer)] = flag
        if self._updates is not None:
            self._updates.note(flag)

    def _decide(self, optimizer: Optimizer) -> Decision:
        return self._flags.pop(id(optimizer), None)


def _is_finite(buffer: Tensor) -> bool:
    # waits for the device: at a point after a step that was left out, until something is found
    return bool(local(buffer).isfinite().all())
