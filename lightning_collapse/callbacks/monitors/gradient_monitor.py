"""Gradient monitor: gradient norms, gradient noise scale and coherence of micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan, sqrt
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.monitoring.gradient_noise_window import GradientNoiseWindow, Noise
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.batch import batch_size
from lightning_collapse.utilities.distributed import all_reduce_sum
from lightning_collapse.utilities.gradients import gradients_of, places_of, squared_norms
from lightning_collapse.utilities.modules import default_taps, find_taps
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.trainer import (
    ends_step,
    is_due,
    loss_scale,
    refuse_flattened,
    synchronizes_last,
    unscaled_squares,
)

_MICRO, _NOISE = "micro-batch gradients", "McCandlish et al. 2018, arXiv 1812.06162"


class GradientMonitor(Monitor):
    """Log gradient norms per layer and, where gradients are accumulated, how noisy they are.

    **Logged metrics**, ``gradients/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    Norms are drawn of every layer and, as ``all``, of the whole model. The noise is drawn of the whole model with
    ``Trainer(accumulate_grad_batches)`` of 2 or more, because then the gradients of micro-batches can be told apart:
    averages over points of the estimates of :func:`~lightning_collapse.functional.gradient_noise_scale`, and
    :func:`~lightning_collapse.functional.gradient_coherence`. The flag is ``NONFINITE`` if the gradient holds NaN or
    infinity (the norm reads NaN), ``NOT_CALLED`` if there was none.

    Norms are taken when Lightning announces an optimizer step: under manual optimization step the optimizers that
    ``self.optimizers()`` returns. With several optimizers each counts with the parameters it updates, and the last of
    several steps in a batch is what is drawn. For the noise a copy of the gradients is kept during the accumulation
    window that ends in a point; sparse gradients have no part in it. Data-parallel training needs 3 micro-batches for
    a coherence.

    Args:
        layers: Names of submodules, or glob patterns of them; all parameters inside count. ``None`` takes up to a dozen
            by the rule of ``default_taps``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        noise: Whether to read the noise where gradients are accumulated.
        smoothing: Weight of the past in the two averages, per point; 0 for none.
        micro_batch_size: Samples of a micro-batch on one process; ``None`` reads the first dimension of the first
            tensor of a batch.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing, and for ``strategy="fsdp"``, whose flattened gradients belong to no layer.

    Example::

        trainer = Trainer(callbacks=[GradientMonitor()], accumulate_grad_batches=4)
    """

    family = "gradients"
    declares = (
        Curve(
            "norm",
            "Euclidean norm of the gradient, before clipping and without loss scale",
            "0 to infinity",
            "near 0, or growing",
        ),
        Curve("flag", "gradient", "0 to 6", "above 0: why to doubt the point"),
        Curve("noise_trace", _MICRO, "0 to infinity", "does not tell", _NOISE),
        Curve("noise_signal", _MICRO, "0 to infinity, below in noise", "near 0", _NOISE),
        Curve("noise_scale", _MICRO, "0 to infinity, in samples", "far above the batch size", _NOISE),
        Curve(
            "coherence", _MICRO, "-1 / (K - 1) to 1", "near 0", "mean cosine of micro-batches, weighted by their norms"
        ),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        every_n_steps: int | None = None,
        noise: bool = True,
        smoothing: float = 0.9,
        micro_batch_size: int | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "the default layers")
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must be at least 0 and less than 1, got {smoothing}.")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(
                f"`micro_batch_size` must be at least 1, or None to read it from batches, got {micro_batch_size}."
            )
        self.layers = layers
        self.noise = noise
        self.smoothing = smoothing
        self.micro_batch_size = micro_batch_size
        self._averages = [0.0, 0.0, 0.0]  # of the trace, of the signal, and of one: the last corrects the start
        self._forget()

    def _forget(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._names: list[str] = []
        self._belongs = torch.zeros(0, 0)  # which parameters are inside which of them
        self._norms: list[tuple[list[int], list[float], Tensor]] = []
        self._window: GradientNoiseWindow | None = None
        self._size = self._accumulated = 1

    @override
    def state(self) -> dict[str, Any]:
        return {"averages": list(self._averages)}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._averages = list(state["averages"])

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_flattened(trainer, type(self).__name__, "gradients")
        self._averages = [0.0, 0.0, 0.0]
        self._parameters = list(pl_module.parameters())
        index = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        modules = self._choose(pl_module) | {"all": pl_module}
        self._names = list(modules)
        self._belongs = torch.zeros(len(modules), len(index))
        for row, module in zip(self._belongs, modules.values(), strict=True):
            row[[index[id(parameter)] for parameter in module.parameters()]] = 1.0
        if self.noise and trainer.accumulate_grad_batches == 1:
            rank_zero_info(
                "`GradientMonitor` draws norms only: the noise in gradients can be read where they are accumulated,"
                " `Trainer(accumulate_grad_batches=2)` or more."
            )

    @override
    def stop(self) -> None:
        self._forget()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        self._norms.clear()
        if not self.noise or batches_left >= trainer.accumulate_grad_batches or trainer.accumulate_grad_batches < 2:
            return
        if self._window is None:
            self._window = GradientNoiseWindow(self._parameters, trainer.lightning_module.device)
        self._size = self.micro_batch_size or batch_size(batch)
        self._accumulated = trainer.accumulate_grad_batches

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._window is not None:
            last = ends_step(trainer)
            self._window.add(self._size, last and synchronizes_last(trainer), loss_scale(trainer), last)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if batches_left and ends_step(trainer):  # the end of an epoch has cut the accumulation short
            self._window = None

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not is_due(trainer, self._every):
            return
        mine = places_of(optimizer, self._parameters)
        found = gradients_of([self._parameters[i] for i in mine])
        squares = unscaled_squares(trainer, optimizer, squared_norms(found.tensors, pl_module.device))
        self._norms.append(([mine[i] for i in found.indices], found.shares, squares))

    @override
    @torch.no_grad()
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Squared norms and numbers of gradients, one for every layer; statistics of the noise."""
        squares = squared_norms([], pl_module.device).new_zeros(len(self._parameters))
        shares = torch.zeros(len(self._parameters), dtype=squares.dtype)
        for indices, of_shard, values in self._norms:  # the last of several steps counts
            squares[torch.tensor(indices, device=squares.device, dtype=torch.long)] = values
            shares[indices] = torch.tensor(of_shard, dtype=squares.dtype)
        self._norms.clear()
        known = (self._belongs @ (shares > 0).to(self._belongs)).to(squares)
        # 0 * nan: a bad gradient must not reach layers it is not in
        each = torch.where(self._belongs.to(squares) > 0, squares * shares.to(squares), 0.0).sum(dim=1)
        parts = {"square": each, "gradients": known}
        if self._window is not None:
            parts["noise"] = self._window.statistics()
        total = all_reduce_sum(torch.cat(list(parts.values())))
        split = torch.split(total, [len(part) for part in parts.values()])
        return {("", name): part for name, part in zip(parts, split, strict=True)}

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points: list[Point] = []
        for name, square, count in zip(self._names, numbers["", "square"], numbers["", "gradients"], strict=True):
            points += self._points_of(name, step, square, count)
        window, self._window = self._window, None
        if window is not None:
            noise = window.noise(numbers["", "noise"], self._accumulated)
            points += self._points_of_noise(noise, step, points[-1].flag)
        return points

    def _points_of(self, name: str, step: int, square: float, count: float) -> list[Point]:
        flag = Flag.OK if isfinite(square) else Flag.NONFINITE
        if not count:
            flag = Flag.NOT_CALLED
            self.warn_of_layer(name, "there was no gradient of {} at a point; the curves read NaN there.")
        norm = nan if flag else sqrt(square)
        values = {"norm": norm, "flag": float(flag)}
        return [Point(self.family, name, key, step, value, flag=flag) for key, value in values.items()]

    def _points_of_noise(self, noise: Noise, step: int, flag: Flag) -> list[Point]:
        if flag == Flag.OK and isfinite(noise.trace) and isfinite(noise.signal):
            fresh = (noise.trace, noise.signal, 1.0)
            past = self.smoothing
            self._averages = [past * old + (1 - past) * x for old, x in zip(self._averages, fresh, strict=True)]
        elif flag == Flag.OK:
            flag = Flag.FEW_ROWS
        total, signal, weight = self._averages
        total, signal = (total / weight, signal / weight) if weight else (nan, nan)
        curves = {
            "noise_trace": total,
            "noise_signal": signal,
            "noise_scale": total / signal if signal > 0 else nan,
            "coherence": noise.coherence,
        }
        return [
            Point("gradients", "all", name, step, value, noise.samples, flag=flag) for name, value in curves.items()
        ]

    def _choose(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        if self.layers is None:
            taps = [tap for tap in default_taps(pl_module) if any(p.requires_grad for p in tap.module.parameters())]
        else:
            try:
                taps = find_taps(pl_module, self.layers)
            except ValueError as error:
                raise MisconfigurationException(f"`GradientMonitor(layers={list(self.layers)!r})`: {error}") from error
        first = {id(tap.module): tap for tap in reversed(taps)}  # of the input and the output of a module one
        kept = [tap for tap in taps if first[id(tap.module)] is tap]
        return {tap.name.removesuffix(".input") if tap.side == "input" else tap.name: tap.module for tap in kept}
