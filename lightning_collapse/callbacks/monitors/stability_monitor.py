"""Stability monitor: loss and gradient norm of every step, their spikes, shifts and non-finite values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import nan
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.monitoring.step_signals import COLUMNS, StepSignals
from lightning_collapse.rules.base import ALL
from lightning_collapse.rules.step_stream import Step, StepStream
from lightning_collapse.spectral.deterministic import nan_median
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size
from lightning_collapse.utilities.gradients import gradients_of, norms_of, places_of
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.trainer import (
    logging_step,
    loss_scale,
    planned_steps,
    refuse_flattened,
    unscaled_squares,
)

_LOSS, _NORM = "the loss of every step", "the norm of every step's gradient"
_OLMO = "after OLMo-core's SpikeScore"
QUIET = frozenset(
    {"loss_shifted", "loss_over_start", "grad_norm_ratio", "loss_change", "since", "skipped_share", "accepted"}
)
"""Curves for rules, which loggers are not given."""
RISE = 2.0
"""Norm of a module's gradient, over its median before, from which a burst is told to be its."""
SHOWN = 8
"""Modules that a burst is told of."""
MOST_PLACES = 8
"""Sets of parameters with a gradient whose places are kept on the device: one for each optimizer."""

OnFlag = Callable[[Trainer, Optimizer, Tensor], object]


class StabilityMonitor(Monitor):
    """Log what is unstable: spikes and lasting shifts of the loss and of the gradient norm, and non-finite steps.

    Loss and norm are read at *every* optimizer step and stay on the device until the next point; the norm is that of
    the whole gradient, after the reduction over processes, before clipping, and without the factor of a gradient
    scaler; the loss is the mean over processes and accumulated batches. A point then tells

    - *bursts*, single steps far above the 128 accepted ones before (robust scores of the logarithms,
      :class:`~lightning_collapse.monitoring.StepSignals`), and which modules' gradients rose in the first of them;
    - *shifts* of the level, by a sequential test with a stated rate of false alarms
      (:class:`~lightning_collapse.rules.LevelShift`), and for how many steps the loss has not come back;
    - *non-finite* steps.

    **Logged metrics**, ``stability/{layer}/...``, to every logger and to ``trainer.callback_metrics``. The layer is
    ``all``, or ``optimizer_0``, ``optimizer_1`` and so on where there are several, or a module, with the name of the
    optimizer before it where there are several:

    {curves}

    ``CollapseGuard`` says *loss spike*, *divergence ahead* and *non finite step* from them, and its action ``SkipStep``
    leaves out the update of a step that is a burst or not finite.

    An infinite gradient under a gradient scaler is the scaler's search for its factor and does not count. A closure
    that is called several times in a step, as by LBFGS, counts once. With manual optimization call
    ``self.manual_backward`` and step the optimizers that ``self.optimizers()`` returns.

    Args:
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        threshold: Robust standard deviations above which a single step is a burst.
        limit: Bursts in a row after which their level is accepted as the new one.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers.

    Attributes:
        on_flag: Functions that are called with the trainer, the optimizer and the flag of every step before its update:
            0-dimensional ``float32`` on the device, exactly 1 for a burst or a step that is not finite, else exactly 0,
            and the same on every process.
        skips: Whether one of them skips the step if the flag is 1; for the count.

    Raises:
        ValueError: If an argument is out of range; when the fit starts, as ``MisconfigurationException``, for
            ``strategy="fsdp"``, whose flattened gradients belong to no module.

    Example::

        trainer = Trainer(callbacks=[StabilityMonitor(), CollapseGuard()])
    """

    family = "stability"
    declares = (
        Curve("loss", f"mean of {_LOSS} since the last point", "any", "rising"),
        Curve("grad_norm", f"mean of {_NORM} since the last point", "0 to infinity", "rising"),
        Curve("loss_z", f"largest score of {_LOSS}: robust deviations above those before", "any", "above 6", _OLMO),
        Curve(
            "grad_norm_z", f"largest score of {_NORM}: robust deviations above those before", "any", "above 6", _OLMO
        ),
        Curve("loss_cusum", f"CUSUM of {_LOSS} over its threshold", "0 to 2", "1 or more", "Page 1954"),
        Curve("grad_norm_cusum", f"CUSUM of {_NORM} over its threshold", "0 to 2", "1 or more", "Page 1954"),
        Curve("loss_shifted", "for how many steps the loss has been on a higher level", "0 to infinity", "32 or more"),
        Curve(
            "loss_over_start",
            "for how many steps on that level the loss has been above where the run began",
            "0 to infinity",
            "8 or more",
        ),
        Curve(
            "grad_norm_ratio",
            "level of the gradient norm over that before it shifted",
            "0 to infinity, 1 without",
            "high",
        ),
        Curve(
            "loss_change", "level of the loss over that before the gradient norm shifted", "any, 1 without", "1 or more"
        ),
        Curve("since", "the last step before the shift that lasts", "0 to infinity, NaN without", "does not tell"),
        Curve("spike_rate", "share of bursts among the last 10,000 steps", "0 to 1", "above 0.0001", _OLMO),
        Curve("surge", "gradient norm of the first burst over its median before", "0 to infinity, 1 without", "high"),
        Curve("nonfinite_steps", "steps with NaN or infinity so far", "0 to infinity", "above 0"),
        Curve("nonfinite_in_a_row", "steps with NaN or infinity in a row, up to the point", "0 to infinity", "above 0"),
        Curve("skipped", "steps that `SkipStep` has skipped so far", "0 to infinity", "above 1 % of all"),
        Curve("skipped_share", "steps skipped among the last 1,000, over 1,000", "0 to 1", "0.01 or more"),
        Curve("accepted", "new levels since the last point, after `limit` bursts in a row", "0 to infinity", "above 0"),
    )

    def __init__(
        self,
        every_n_steps: int | None = None,
        threshold: float = 6.0,
        limit: int = 8,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        if not threshold > 0:
            raise ValueError(f"`threshold` is in robust standard deviations and must be positive, got {threshold}.")
        if limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {limit}.")
        self.threshold = threshold
        self.limit = limit
        self.on_flag: list[OnFlag] = []
        self.skips = False
        self._forget()

    def _forget(self) -> None:
        self._signals: list[StepSignals] = []
        self._streams: list[StepStream] = []
        self._losses: list[Tensor] = []
        self._parameters: list[nn.Parameter] = []
        self._owners: list[str] = []  # of the parameters, the modules
        self._places: dict[tuple[int, ...], tuple[Tensor | None, Tensor]] = {}
        self._of_optimizer: dict[int, list[int]] = {}
        self._steps: list[list[int]] = []
        self._surges: list[dict[str, float]] = []
        self._batch = self._stepped = -1
        self._failed = False

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_flattened(trainer, type(self).__name__, "gradients")
        self._forget()
        named = list(pl_module.named_parameters())
        self._device, self._parameters = pl_module.device, [parameter for _, parameter in named]
        self._owners = [name.rpartition(".")[0] or name for name, _ in named]
        planned = planned_steps(trainer)
        for _ in trainer.optimizers:
            self._signals.append(StepSignals(pl_module.device, self.threshold, self.limit))
            self._streams.append(StepStream(planned))
            self._steps.append([])
            self._surges.append({})

    @property
    def skipped(self) -> int:
        """Steps that were skipped up to the last point."""
        return sum(stream.skipped for stream in self._streams)

    @override
    def stop(self) -> None:
        self._forget()

    @override
    def state(self) -> dict[str, Any]:
        return {
            "signals": [signals.state_dict() for signals in self._signals],
            "streams": [stream.state_dict() for stream in self._streams],
            "surges": [dict(surges) for surges in self._surges],
        }

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        for signals, of in zip(self._signals, state["signals"], strict=True):
            signals.load_state_dict(of)
        for stream, of in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(of)
        self._surges = [dict(surges) for surges in state["surges"]]

    def on_turned_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew: what comes does not follow what was last."""
        for stream in self._streams:
            stream.restart()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        self._batch += 1

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self._signals or self._left < 0:  # a trainer that makes no points
            return
        loss, scale = loss.detach(), loss_scale(trainer)
        # a copy: it waits, and its memory may be the user's, or a CUDA graph's, which the next step writes to
        loss = loss.mean() if loss.ndim else loss.clone()
        self._losses.append(loss if scale is None else loss / scale.to(loss))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._signals or self._left < 0:
            return
        index = next((i for i, one in enumerate(trainer.optimizers) if one is optimizer), None)
        if index is None or (pl_module.automatic_optimization and self._stepped == self._batch):
            return  # a closure that is called again
        self._stepped = self._batch
        own = None
        try:  # at every step, where a context costs as much as what is inside
            loss, (norms, shares) = self._loss(trainer, pl_module), self._norms(pl_module, optimizer)
            if world_size() == 1 and not self.on_flag and loss_scale(trainer, optimizer) is None:
                if self._has_learned(loss):  # nobody asks at once: steps are judged together
                    self._signals[index].skips = self.skips
                    self._signals[index].note(logging_step(trainer), loss, norms, loss_scale(trainer) is not None)
                return
            own = loss, norms.to(accumulation_dtype(self._device)).square() * shares
        except Exception as error:
            self._give_up(error)
        try:  # whatever has failed here: the other processes wait
            known = own if world_size() == 1 else self._of_all(None if self._failed else own)
            if known is not None:
                self._take(trainer, optimizer, index, *known)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Its curves end: at once, or where there are several processes on all of them with the next point."""
        self.contained.catch("reading the gradients", "its curves end here", error)
        self._failed = True
        if world_size() == 1:
            self._signals.clear()

    def _of_all(self, own: tuple[Tensor | None, Tensor] | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Loss and squares over all processes, and whether one of them has none of its own to tell. Collective."""
        mine = torch.zeros(3 + len(self._parameters), device=self._device, dtype=accumulation_dtype(self._device))
        loss = None
        if own is None:
            mine[2] = 1
        else:
            loss, mine[3:] = own
        if loss is not None:
            mine[0], mine[1] = loss, 1
        total = all_reduce_sum(mine)
        mean = total[0] / total[1] if own is None or loss is not None else None
        return mean, total[3:], total[2] > 0

    @torch.no_grad()
    def _take(
        self,
        trainer: Trainer,
        optimizer: Optimizer,
        index: int,
        loss: Tensor | None,
        squares: Tensor,
        unknown: Tensor | None = None,
    ) -> None:
        """Read one step of an optimizer."""
        if not self._has_learned(loss):
            return
        squares = unscaled_squares(trainer, optimizer, squares)
        signals, norm = self._signals[index], squares.sum().sqrt()
        signals.skips = self.skips
        flag = signals.update(logging_step(trainer), loss, norm, loss_scale(trainer) is not None, squares, unknown)
        for act in self.on_flag:
            act(trainer, optimizer, flag)

    def _loss(self, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
        """Mean of the losses since the last step: Lightning has divided them by the number it accumulates."""
        losses, self._losses = self._losses, []
        if not losses:
            return None
        mean = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        scaled = pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1
        return mean * trainer.accumulate_grad_batches if scaled else mean

    def _has_learned(self, loss: Tensor | None) -> bool:
        """Whether there is anything to read: not if a training step returned nothing."""
        return loss is not None or any(parameter.grad is not None for parameter in self._parameters)

    @torch.no_grad()
    def _norms(self, pl_module: LightningModule, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
        """Norms of this process's parts of the gradients, a number for every parameter, and what their squares count.

        Without a gradient it is 0.
        """
        mine = self._of_optimizer.get(id(optimizer))
        if mine is None or sum(len(group["params"]) for group in optimizer.param_groups) != len(mine):
            known, mine = mine, places_of(optimizer, self._parameters)
            self._of_optimizer[id(optimizer)] = mine
            if mine != known:
                self._places.clear()
        found = gradients_of([self._parameters[i] for i in mine])
        norms = norms_of(found.tensors, pl_module.device)
        key = (id(optimizer), *found.indices)
        if key not in self._places:
            if len(self._places) > MOST_PLACES:
                self._places.clear()
            where = torch.tensor([mine[i] for i in found.indices], device=norms.device, dtype=torch.long)
            counts = torch.tensor(found.shares, device=norms.device, dtype=accumulation_dtype(norms.device))
            shares = counts.new_zeros(len(self._parameters)).index_copy(0, where, counts)
            self._places[key] = (None if len(where) == len(shares) else where), shares
        places, shares = self._places[key]
        return norms if places is None else norms.new_zeros(len(shares)).index_copy(0, places, norms), shares

    @override
    @torch.no_grad()
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Rows of all steps since the last point, and the surges of the first flagged one."""
        if self._failed and self._signals:  # of several processes: all leave the point out
            raise RuntimeError("the gradients could not be read")
        readings: dict[Name, Tensor] = {}
        for index, signals in enumerate(self._signals):
            if (squares := signals.pop_squares()) is not None:
                readings[str(index), "surges"] = self._rises(squares)
            self._steps[index], rows = signals.pop()
            readings[str(index), "rows"] = rows.flatten()
        return readings

    def _rises(self, squares: Tensor) -> Tensor:
        """Norm of the last row over the median of those before, of everything and of every module; NaN without one."""
        modules = {name: i for i, name in enumerate(dict.fromkeys(self._owners))}
        where = torch.tensor([modules[name] for name in self._owners], device=squares.device)
        of_modules = squares.new_zeros(len(squares), len(modules)).index_add_(1, where, squares)
        norms = torch.cat([squares.sum(dim=1, keepdim=True), of_modules], dim=1).sqrt()
        before = nan_median(norms[:-1], dim=0)
        ratio = torch.where(before > 0, norms[-1] / before, torch.nan)
        flagged = before.isfinite().any()  # NaN throughout where no step was flagged
        return torch.where(norms[-1].isfinite() | ~flagged, ratio, torch.inf)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points: list[Point] = []
        for index, stream in enumerate(self._streams[: len(self._signals)]):
            layer = ALL if len(self._streams) == 1 else f"optimizer_{index}"
            flat = numbers[str(index), "rows"]
            rows = [Step(*flat[i : i + len(COLUMNS)]) for i in range(0, len(flat), len(COLUMNS))]
            known = {} if stream.calm else self._surges[index]
            readings = stream.update(self._steps[index], rows)
            surge, *surges = numbers.get((str(index), "surges"), [nan])
            if surge > known.get(layer, 0.0):  # of what goes on the beginning is told
                modules = dict(zip(dict.fromkeys(self._owners), surges, strict=True))
                self._surges[index] = {layer: surge} | _largest(modules)
            elif stream.calm:
                self._surges[index] = {}
            told = {layer: 1.0} | self._surges[index]
            points += [
                Point(self.family, layer, name, step, value, drawn=name not in QUIET)
                for name, value in readings.items()
            ]
            for module, value in told.items():
                where = module if layer in (ALL, module) else f"{layer}.{module}"
                points.append(Point(self.family, where, "surge", step, value, drawn=False))
        return points


def _largest(surges: Mapping[str, float]) -> dict[str, float]:
    """The modules whose gradients rose most, of those that rose at all."""
    known = {name: surge for name, surge in surges.items() if surge > RISE}
    return dict(sorted(known.items(), key=lambda item: -item[1])[:SHOWN])
