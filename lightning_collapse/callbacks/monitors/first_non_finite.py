"""First NaN or infinity: the module that made it, forward or backward, told from those that it ran through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_collapse.callbacks.evaluation.step_replay import StepReplay
from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.callbacks.monitors.stability_monitor import StabilityMonitor
from lightning_collapse.functional.non_finite import Cause, extremes
from lightning_collapse.monitoring.call_frames import CallFrames
from lightning_collapse.monitoring.frame_history import KEPT, FrameHistory
from lightning_collapse.monitoring.non_finite_origin import (
    Origin,
    Reading,
    find_origin,
    first_of_processes,
)
from lightning_collapse.monitoring.scale_history import ScaleHistory
from lightning_collapse.monitoring.step_flags import StepFlags
from lightning_collapse.monitoring.step_frame import STEP
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.monitoring.to_host import to_host
from lightning_collapse.reporting.non_finite_report import report_folder, tell
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_reduce_max, max_over_processes, world_size
from lightning_collapse.utilities.gradients import gradients_of, squared_norms
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.trainer import is_sharded, logging_step, loss_scale
from lightning_collapse.utilities.training_step import wrap_training_step

_MOST_TOLD = 8
"""Failures of a run that are told; of those after them curves tell alone."""


class FirstNonFinite(Monitor):
    r"""Names the module that made the first NaN or infinity, and writes a table of what was passed on before it.

    In the step of a point it measures the extremes of every tensor that modules receive and return, of their
    gradients and of the weights, once each. Time decides who made the first that is not finite: a module that received
    finite numbers and has finite weights is the producer, what comes behind only passes it on. The cause is the data,
    an earlier update, an overflow, an undefined operation or the backward pass, see
    :class:`~lightning_collapse.functional.Cause`; what is computed between modules is the module's around, or
    ``training_step``'s. In other steps there is no hook, and only loss, batch and gradients are noted. After one that
    was not finite every step is measured, until all has been finite for eight points.

    The finding is told once: on the console, as text to every logger (``nonfinite/first``) and as JSON in a folder
    ``nonfinite`` beside the run's logs, at the next point, or when the fit ends before it. The table shows the last 21
    tensors, with their largest magnitudes in the steps before and the bits they may grow.

    A step that fails between two points leaves NaN in all weights. That it came with the batch, in the forward pass or
    first in the gradient of a weight is known even so, which module made it is not, and that is said. ``replay=True``
    is for this: every step is asked, before its update, whether loss and gradients are finite, and one that fails is
    repeated at once from the random states and buffers it began with, every module measured, those of compiled parts
    too. Nothing of the training changes by it; terms that other callbacks add to the loss are left out. It costs the
    host one wait for the device in every step.

    Under a gradient scaler infinite gradients with a finite loss are the scaler's way to find its scale. They are a
    failure where the scale is halved more than five times within 100 steps, or reaches 1.

    **Logged metrics**, ``nonfinite/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    ``cause`` and ``step`` are drawn of the module that was found, the others as ``all``.

    Args:
        replay: Whether to repeat a failing step at once; for automatic optimization and weights that are not sharded.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: If ``every_n_steps`` is not positive; when the fit starts, as ``MisconfigurationException``, if a
            step that is to be repeated steps optimizers itself, or needs other processes.

    References:
        The table of the last calls follows ``DebugUnderflowOverflow`` of Hugging Face ``transformers``, 2021; formats:
        Micikevicius et al., ICLR 2018, https://arxiv.org/abs/1710.03740.

    Example::

        trainer = Trainer(callbacks=[FirstNonFinite(), CollapseGuard()])
    """

    family = "nonfinite"
    declares = (
        Curve("steps", "batches whose loss was not finite, so far", "0 to infinity", "above 0"),
        Curve("first_call", "calls that had ended before the first NaN", "0 to infinity, -1 for none", "0 or more"),
        Curve(
            "headroom",
            "how often the largest number passed on may double before it overflows",
            "0 to 277; of float16 to 40",
            "near 0",
        ),
        Curve("halvings", "how often the loss scale fell in the last 100 steps", "0 to 100", "above 5"),
        Curve(
            "cause",
            "what made the first NaN: 1 data, 2 update, 3 overflow, 4 undefined, 5 backward, 6 unseen",
            "0 to 6",
        ),
        Curve("step", "optimizer step of the first NaN", "0 to infinity", "does not tell"),
        Curve("left_out", "whether `SkipStep` leaves out updates that are not finite", "0 or 1", "does not tell"),
    )
    identity = ("replay", "every_n_steps")

    def __init__(self, replay: bool = False, every_n_steps: int | None = None, detail: Detail = "high") -> None:
        super().__init__(every_n_steps, detail)
        if not isinstance(replay, bool):
            raise ValueError(f"`replay` must be True or False, got {replay!r}.")
        self.replay = replay
        self._frames: CallFrames | None = None
        self._reset()

    def _reset(self) -> None:
        self._history, self._scales = FrameHistory(), ScaleHistory()
        self._untold: list[Origin] = []
        self._named: dict[str, int] = {}
        self._left_out = False
        self._latest: dict[str, Any] = {}
        self._steps = self._calm = self._told = 0
        self._alarm = self._quiet = self._begun = self._raised = False

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)
        self._reset()
        self._folder = report_folder(trainer)
        self._flags = StepFlags(pl_module.device, dict(pl_module.named_parameters()))
        self._again = StepReplay(pl_module) if self.replay else None
        self._frames = CallFrames(pl_module, self.contained)
        self._scope = StepScope(pl_module)
        self._unwrap = wrap_training_step(pl_module, self._around)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        instead = "Leave `replay` away, or set `every_n_steps=1`, which measures every step."
        if self.replay and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "`FirstNonFinite(replay=True)` repeats a training step, which under manual optimization would step the"
                f" optimizers again. {instead}"
            )
        if self.replay and is_sharded(trainer, pl_module):
            raise MisconfigurationException(
                "`FirstNonFinite(replay=True)` repeats a step on each process by itself, and none holds all of the"
                f" weights here. {instead}"
            )

    @override
    def stop(self) -> None:
        if self._frames is not None:
            self._unwrap()
            self._scope.remove()
            self._frames.remove()
            self._flags.clear()
        self._frames = self._again = self._scope = self._unwrap = None  # type: ignore[assignment]
        self._history, self._untold = FrameHistory(), []

    @override
    def state(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "calm": self._calm,
            "told": self._told,
            "alarm": self._alarm,
            "quiet": self._quiet,
            "named": dict(self._named),
            "latest": dict(self._latest),
            "scales": self._scales.state_dict(),
        }

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._steps, self._calm, self._told = state["steps"], state["calm"], state["told"]
        self._alarm, self._quiet = state["alarm"], state["quiet"]
        self._named, self._latest = dict(state["named"]), dict(state["latest"])
        self._scales.load_state_dict(state["scales"])

    @property
    @override
    def listeners(self) -> list[HookOwner]:
        return [] if self._frames is None else [self._frames]

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._frames is None:
            return
        if batches_left == 0 or self._alarm or self._history.is_empty:
            self._begun = False
            self._frames.open(logging_step(trainer))
            self._scope.request(self._frames)
        elif self._again is None:
            self._flags.note_batch(batch)

    def _around(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A training step: what it begins with, what it returns, and whether it fails."""
        frames, again = self._frames, self._again
        measured = frames is not None and frames.frame is not None and not self._begun
        if measured or again is not None:
            try:
                if again is not None:
                    again.keep(args, kwargs)
                if measured and frames is not None:
                    self._begun = True
                    frames.begin((args, kwargs))
            except Exception as error:
                self.contained.catch("looking at a batch", "the first NaN may go unnamed", error)
        self._raised = True
        output = step(*args, **kwargs)
        self._raised = False
        if measured and frames is not None:
            try:
                frames.end(output)
            except Exception as error:
                self.contained.catch("looking at the loss", "the first NaN may go unnamed", error)
        return output

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._frames is None or self._left < 0:
            return
        try:  # at every step, where a context costs as much as what is inside
            self._flags.note(logging_step(trainer), loss)
            if not pl_module.automatic_optimization:
                self._frames.note_loss(loss)
        except Exception as error:
            self.contained.catch("noting the loss", "a loss that is not finite may go untold", error)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._frames is None or (self._frames.frame is None and self._again is None):
            return
        with self.contained("looking at gradients", "what the backward pass makes may go unnamed"):
            self._frames.note_gradients(judged=loss_scale(trainer) is None)
        if self._again is not None and not self._quiet and self._frames.frame is None:
            with self.contained("asking whether a step is finite", "it is not repeated"):
                self._repeat_if_failing(trainer, pl_module, self._again, self._frames)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._frames is None or self._left < 0 or self._again is not None or self._frames.frame is not None:
            return
        with self.contained("noting the gradients", "what the backward pass makes may go untold"):
            if loss_scale(trainer) is None:
                self._flags.note_gradients()

    def _repeat_if_failing(
        self, trainer: Trainer, pl_module: LightningModule, again: StepReplay, frames: CallFrames
    ) -> None:
        """Ask, wait for the answer, and repeat the step if loss or gradients are not finite. Collective."""
        loss, gradients = self._flags.latest, gradients_of(list(pl_module.parameters())).tensors
        scaled = loss_scale(trainer) is not None
        finite = loss is None or loss.isfinite()
        norms = squared_norms([] if scaled else gradients, pl_module.device)
        [fails] = max_over_processes([float(~(norms.sum().isfinite() & finite))], pl_module.device)
        if not fails:
            return
        # squares may overflow where numbers do not; waits for the device once more, in a step that looks ill alone
        own = [bool(extremes(gradient)[1].isfinite()) for gradient in gradients if gradient.numel() and not scaled]
        [fails] = max_over_processes([float(not (all(own) and bool(finite)))], pl_module.device)
        if not fails:
            return
        step, frame = logging_step(trainer), None
        words = "loss or gradients are not finite, and the step could not be repeated"
        with self.contained("repeating a step", "who made the first NaN is not known"):
            frame = again.run(trainer, frames, step)
        origin = None
        if frame is not None:
            origin = find_origin(Reading(frame), self._history.before())
            words = "repeated at once the step is finite: it was made outside of the module, or by the machine"
        self._take(first_of_processes(origin or Origin(step, Cause.UNSEEN, STEP, words)))

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._frames is None:
            return
        if self._again is not None:
            self._again.forget()
        self._scales.note(loss_scale(trainer))
        self._history.add(self._frames.close())
        if self._untold:
            self._tell(trainer)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        self._left_out = any(isinstance(c, StabilityMonitor) and c.skips for c in trainer.callbacks)
        device = pl_module.device
        dtype = accumulation_dtype(device)
        count, first_loss, first_gradient, _ = self._flags.read().unbind()
        first_bad, bits = self._history.first_bad(device, dtype), self._history.bits(device, dtype)
        halvings, scale = self._scales.read(device)
        own = {"first_bad": -first_bad, "first_flag": -torch.minimum(first_loss, first_gradient), "bits": -bits}
        own |= {"count": count, "halvings": halvings, "scale": -scale}
        everyone = all_reduce_max(torch.stack([value.to(device, dtype) for value in own.values()]))
        return {("", name): value for name, value in zip(own, everyone.unbind(), strict=True)}

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        first_bad, first_flag, bits, scale = (-numbers["", x] for x in ("first_bad", "first_flag", "bits", "scale"))
        halvings = numbers["", "halvings"]
        falls = ScaleHistory.is_failure(halvings, scale)
        flagged = min(first_bad, first_flag) < inf
        ill = flagged or falls
        # where every step is measured, one that fails after one that did not is another failure
        if ill and (not self._quiet or 0 < first_bad < inf) and self._told < _MOST_TOLD:
            origin = self._history.origin(first_bad, first_flag, self._flags)
            if not flagged:
                words = f"the loss scale fell {halvings:.0f} times within 100 steps, to {scale:.3g}"
                origin = Origin(step, Cause.BACKWARD, STEP, words)
            self._take(first_of_processes(origin))
        self._steps += int(numbers["", "count"])
        self._settle(ill)
        latest = self._latest if ill else {}
        drawn = {"steps": self._steps, "first_call": latest.get("call", -1), "headroom": bits, "halvings": halvings}
        points = [Point(self.family, "all", name, step, float(x)) for name, x in drawn.items() if isfinite(x)]
        for layer, of in self._named.items():
            cause = latest.get("cause", 0) if latest.get("layer") == layer else Cause.NONE
            found = {"cause": float(cause), "step": float(of), "left_out": float(self._left_out)}
            points += [Point(self.family, layer, name, step, value) for name, value in found.items()]
        return points

    def _take(self, origin: Origin | None) -> None:
        """Keep a finding until it is told; nothing is looked for until all has been finite again."""
        if origin is not None:
            self._untold.append(origin)
            self._told += 1
            self._quiet = self._alarm = True
            self._named[origin.layer] = origin.step
            self._latest = {"layer": origin.layer, "cause": int(origin.cause), "call": origin.call}

    def _settle(self, ill: bool) -> None:
        """Begin anew after a point, and go back to few steps once all has been finite for long."""
        self._flags.clear()
        self._history.settle(healthy=not ill)
        self._calm = 0 if ill else self._calm + 1
        self._alarm = ill or (self._alarm and self._calm < KEPT)
        self._quiet = self._quiet and ill

    @override
    def draw(self, trainer: Trainer, step: int) -> None:
        self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        while self._untold:
            tell(trainer, self._untold.pop(0), self._folder)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._frames is not None and self._left >= 0 and not (self._quiet or self._has_failed(pl_module)):
            with self.contained("looking at the last steps", "what failed in them goes untold"):
                self._look_at_weights(trainer, self._frames)
                points = self.points(logging_step(trainer), to_host(self.read(trainer, pl_module)))
                if self._untold:
                    self.publish(trainer, pl_module, points)
                    self._tell(trainer)
        super().on_train_end(trainer, pl_module)

    def _has_failed(self, pl_module: LightningModule) -> bool:
        """Whether something of it has failed, on any process. Collective, at the end of the fit."""
        [failed] = max_over_processes([float(bool(self.contained.failed))], pl_module.device)
        return bool(failed)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._frames is not None and not self._quiet and isinstance(exception, Exception):
            with self.contained("looking at the step that failed", "what made a NaN in it goes untold"):
                self._take(self._last_words(trainer, self._frames))
                self._tell(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _last_words(self, trainer: Trainer, frames: CallFrames) -> Origin | None:
        """What this process alone knows of a step that has failed: the others may be elsewhere.

        Waits for the device: the fit is over.
        """
        frame = frames.close()
        if frame is None and self._raised and self._again is not None and world_size() == 1:
            frame = self._again.run(trainer, frames, logging_step(trainer))
        if frame is not None:
            frame.raised = self._raised
            self._history.add(frame)
        self._look_at_weights(trainer, frames)
        first_bad = next((i for i, of in enumerate(self._history.fresh) if of.raised or bool(of.bad)), inf)
        return self._history.origin(first_bad, float(self._flags.read()[1:3].min()), self._flags)

    def _look_at_weights(self, trainer: Trainer, frames: CallFrames) -> None:
        """A frame of the weights alone, as the latest update has left them."""
        frames.open(logging_step(trainer))
        self._history.add(frames.close())
