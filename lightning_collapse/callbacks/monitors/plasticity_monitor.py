"""Curves of what a network loses that can no longer learn."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan, sqrt
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Monitor, check_layers
from lightning_collapse.functional.plasticity import dead_fraction, dormant_fraction
from lightning_collapse.functional.rank import srank
from lightning_collapse.monitoring.feature_hooks import Captured, FeatureHooks
from lightning_collapse.monitoring.parameter_snapshot import ParameterSnapshot, absolute_sums
from lightning_collapse.spectral.moments import Moments
from lightning_collapse.spectral.sketch import GaussianSketch
from lightning_collapse.utilities.distributed import all_reduce_sum, max_over_processes
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.modules import Tap, clean_name, default_taps, find_taps, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import register_curve

ROWS = 1024
UNITS = ("dormant_fraction", "dead_fraction", "mean_activation", "srank")


class PlasticityMonitor(Monitor):
    r"""Log how many units are silent, how rich the features are, and how large weights have grown.

    **Logged metrics**, to every logger and to ``trainer.callback_metrics``, of every layer:

    - ``plasticity/{layer}/dormant_fraction``, see :func:`~lightning_collapse.functional.dormant_fraction`, and
      ``plasticity/{layer}/mean_activation``, the mean :math:`E|h|` over all units: a layer that fades as a whole has no
      dormant units;
    - ``plasticity/{layer}/dead_fraction``, see :func:`~lightning_collapse.functional.dead_fraction`; a unit is active
      where it is not exactly zero, so this tells something behind a rectifier only;
    - ``plasticity/{layer}/srank``, see :func:`~lightning_collapse.functional.srank`, of the features as they are;
    - ``plasticity/{layer}/flag``: 0, or why to doubt the point, see :class:`~lightning_collapse.utilities.Flag`;

    and of every layer with parameters, and of the whole model as ``all``:

    - ``plasticity/{layer}/mean_weight``: mean :math:`|w|` of its parameters;
    - ``plasticity/{layer}/init_distance``: :math:`\|\theta - \theta_0\|_2` from where the first fit began; for it one
      copy of the parameters is kept, also in the state.

    A point rests on sums over the training batches just before it, up to 1024 rows per call of a layer. Rows are those
    of :class:`~lightning_collapse.CollapseMonitor`: maps ``(N, C, H, W)`` count by their spatial mean.

    Args:
        layers: Names of submodules, or glob patterns of them; ``"name:input"`` is what a module receives. ``None``
            takes up to a dozen activation modules such as ``nn.ReLU``, where there are none the layers of
            :func:`~lightning_collapse.utilities.default_taps`.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        batches: How many batches a point rests on.
        tau: Threshold of dormant units.
        max_dim: The rank of a layer with more features is that of a random projection to this many.
        distance: Whether to draw ``init_distance``.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing, and for ``strategy="fsdp"``, whose flattened parameters belong to no layer.

    References:
        Sokar et al., ICML 2023, https://arxiv.org/abs/2302.12902; Dohare et al., Nature 2024,
        https://arxiv.org/abs/2306.13812; Kumar et al., ICLR 2021, https://arxiv.org/abs/2010.14498.

    Example::

        trainer = Trainer(callbacks=[PlasticityMonitor()])
    """

    family = "plasticity"

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        every_n_steps: int | None = None,
        batches: int = 4,
        tau: float = 0.025,
        max_dim: int = 2048,
        distance: bool = True,
    ) -> None:
        super().__init__(every_n_steps)
        check_layers(layers, "activations")
        if batches < 1:
            raise ValueError(f"`batches` must be at least 1, got {batches}.")
        if not tau >= 0:
            raise ValueError(f"`tau` must not be negative, got {tau}.")
        if max_dim < 2:
            raise ValueError(f"`max_dim` must be at least 2, got {max_dim}.")
        self.layers, self.batches, self.tau, self.max_dim, self.distance = layers, batches, tau, max_dim, distance
        self._taps: list[Tap] = []
        self._heard: FeatureHooks | None = None
        self._sums: dict[str, _Sums] = {}
        self._sketches: dict[int, GaussianSketch] = {}
        self._parameters: dict[str, Tensor] = {}
        self._groups: dict[str, list[str]] = {}
        self._start: ParameterSnapshot | None = None
        self._restored: dict[str, Tensor] | None = None
        self._points = 0

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layers=self.layers, every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start.state_dict()} if self._start is not None else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("start")

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):
            raise MisconfigurationException(
                "`PlasticityMonitor` cannot read the flattened parameters of `strategy='fsdp'`."
                " Use `ModelParallelStrategy` with `fully_shard`."
            )
        self._taps = self._choose(pl_module)
        let_hooks_be_seen(pl_module)
        self._heard = FeatureHooks(self._taps, ROWS)
        self._points = 0
        self._parameters = {
            name: parameter for name, parameter in pl_module.named_parameters() if not nn.parameter.is_lazy(parameter)
        }
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        modules = {tap.name: tap.module for tap in (self._taps if self.layers is not None else default_taps(pl_module))}
        groups = {
            name.removesuffix(".input"): [names[id(p)] for p in module.parameters() if id(p) in names]
            for name, module in modules.items()
        }
        self._groups = {name: members for name, members in groups.items() if members} | {"all": list(self._parameters)}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.distance:
            saved = self._restored
            if saved is None and self._start is not None:  # a callback that goes through several fits
                saved = self._start.state_dict()
            self._start, self._restored = ParameterSnapshot(self._parameters, saved), None

    @override
    def stop(self) -> None:
        if self._heard is not None:
            self._heard.remove()
        self._heard = None
        self._sums.clear()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._heard is not None and batches_left < self.batches:
            self._heard.armed, self._heard.mask = True, padding_mask(batch)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._heard is None or not self._heard.armed:
            return
        self._heard.armed = False
        for name, heard in self._heard.pop().items():
            width = heard.rows.shape[1]
            if name not in self._sums or self._sums[name].width != width:
                self._sums[name] = _Sums(width, min(width, self.max_dim), pl_module.device)
            if width > self.max_dim and width not in self._sketches:
                self._sketches[width] = GaussianSketch(width, self.max_dim, heard.rows.device)
            self._sums[name].add(heard, self._sketches.get(width))

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> list[Point]:
        device, points = pl_module.device, []
        own = [self._sums[tap.name].width if tap.name in self._sums else 0 for tap in self._taps]
        readings, shown = [], []
        for tap, size in zip(self._taps, max_over_processes(own, device), strict=True):
            width = int(size)
            if not width:
                points += self._points_of(tap.name, step, [nan] * len(UNITS), 0, Flag.NOT_CALLED)
                self.warn_once(f"`{tap.name}` did not run before a point; its curves read NaN there.")
                continue
            sums = self._sums.get(tap.name)
            if sums is None or sums.width != width:
                sums = _Sums(width, min(width, self.max_dim), device)
            readings.append(sums.read(self.tau))
            shown.append((tap.name, width))
        weights = self._read_weights(device)
        # the one transfer of a point
        numbers = torch.cat([*(reading.to(weights) for reading in readings), weights]).tolist()
        for name, width in shown:
            (*values, n, seen), numbers = numbers[: len(UNITS) + 2], numbers[len(UNITS) + 2 :]
            flag = Flag.FEW_ROWS if n < 2 else Flag.NONFINITE if n < seen else Flag.OK
            flag = Flag.SKETCHED if flag is Flag.OK and width > self.max_dim else flag
            points += self._points_of(name, step, values, int(n), flag)
        for name, mean, square in zip(self._groups, numbers[::2], numbers[1::2], strict=True):
            drawn = {"mean_weight": mean} | ({"init_distance": sqrt(square)} if self._start is not None else {})
            flag = Flag.OK if isfinite(mean) else Flag.NONFINITE
            points += [Point("plasticity", name, key, step, value, flag=flag) for key, value in drawn.items()]
        self._sums.clear()
        self._points += 1
        return points

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._points:
            self.warn_of_no_point(trainer)

    def _points_of(self, name: str, step: int, values: Sequence[float], n: int, flag: Flag) -> list[Point]:
        readings = {**dict(zip(UNITS, values, strict=True)), "flag": float(flag)}
        return [Point("plasticity", name, key, step, value, n, flag=flag) for key, value in readings.items()]

    def _read_weights(self, device: torch.device) -> Tensor:
        """Mean absolute weight and squared distance of every group, one after the other, of all processes."""
        absolute = absolute_sums(list(self._parameters.values())).to(device)
        square = (
            self._start.change(self._parameters, order=2) if self._start is not None else torch.zeros_like(absolute)
        )
        both = all_reduce_sum(torch.stack([absolute, square.to(absolute)], dim=1))
        places = {name: i for i, name in enumerate(self._parameters)}
        rows = []
        for members in self._groups.values():
            size = sum(self._parameters[name].numel() for name in members)
            total = both[torch.tensor([places[name] for name in members], device=device)].sum(dim=0)
            rows.append(total / torch.tensor([size, 1], dtype=total.dtype, device=device))
        return torch.cat(rows)

    def _choose(self, pl_module: LightningModule) -> list[Tap]:
        if self.layers is not None:
            try:
                return find_taps(pl_module, self.layers)
            except ValueError as error:
                raise MisconfigurationException(
                    f"`PlasticityMonitor(layers={list(self.layers)!r})`: {error}"
                ) from error
        names = [
            clean_name(name)
            for name, module in pl_module.named_modules()
            if type(module).__module__ == "torch.nn.modules.activation" and not list(module.parameters())
        ]
        kept = names[:: -(-len(names) // 12)] if names else []
        return find_taps(pl_module, kept) if kept else default_taps(pl_module)


class _Sums:
    """Sums over rows of a layer ``width`` wide, whose spectrum is read in ``dim`` dimensions."""

    def __init__(self, width: int, dim: int, device: torch.device) -> None:
        self.width = width
        self.moments = Moments(dim, device)
        self.units = torch.zeros(2, width, dtype=self.moments.count.dtype, device=device)

    def add(self, heard: Captured, sketch: GaussianSketch | None) -> None:
        rows = heard.rows
        self.moments.update(rows if sketch is None else sketch(rows), heard.mask)
        kept = (heard.mask & rows.isfinite().all(dim=1)).unsqueeze(1)
        size = torch.where(kept, rows, 0).to(self.units).abs()
        self.units += torch.stack([size.sum(dim=0), (size > 0).to(size).sum(dim=0)])

    def read(self, tau: float) -> Tensor:
        """Values of :data:`UNITS`, then finite rows and all rows, over all processes. Collective."""
        moments, units = self.moments.reduce(), all_reduce_sum(self.units)
        count = moments.count
        means, active = units / count
        values = [dormant_fraction(means, tau), dead_fraction(active), means.mean(), srank(moments.spectrum(False))]
        values = [torch.where(count > 0, value.to(count), nan) for value in values]
        return torch.stack([*values, count, moments.seen])


def _register() -> None:
    activations, weights = "activations", "weights"
    nature = "Dohare et al., Nature 2024, arXiv 2306.13812"
    for name, reads, span, collapsed, source in (
        ("dormant_fraction", activations, "0 to 1", "growing", "Sokar et al., ICML 2023, arXiv 2302.12902"),
        ("dead_fraction", activations, "0 to 1", "growing", nature),
        ("mean_activation", activations, "0 to infinity", "near 0", "mean of the absolute activation"),
        ("srank", "raw spectrum", "1 to min(n, d), an integer", "near 1", "Kumar et al., ICLR 2021, arXiv 2010.14498"),
        ("flag", activations, "0 to 6", "above 0", "why to doubt the point"),
        ("mean_weight", weights, "0 to infinity", "growing", nature),
        ("init_distance", weights, "0 to infinity", "growing without end", "Euclidean distance from the start"),
    ):
        register_curve("plasticity", name, reads=reads, range=span, collapsed=collapsed, source=source)


_register()
