"""Plasticity monitor: dormant, dead and cloned units, rank and spread of the features, growth of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite, nan, sqrt
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.plasticity import dead_fraction, dormant_fraction
from lightning_collapse.functional.weights import cloned_fraction, magnitude_ratio, std_ratio
from lightning_collapse.monitoring.evaluate import evaluate
from lightning_collapse.monitoring.feature_buffer import LayerFeatures
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.monitoring.parameter_snapshot import ParameterSnapshot, absolute_sums
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.spectral.sketch import GaussianSketch
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size
from lightning_collapse.utilities.execution import Execution
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.modules import Tap, activation_taps, default_taps
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import MEASURES, Curve, Measure
from lightning_collapse.utilities.trainer import refuse_flattened

ROWS = 1024
CLONE_ROWS = 128
"""Rows that clones are told from: so many make no clone by chance."""
_UNITS = (
    "dormant_fraction",
    "dead_fraction",
    "mean_activation",
    "std_ratio",
    "magnitude_ratio",
    "srank",
    "cloned_fraction",
)
_MERGING = "REPAIR: Jordan et al., ICLR 2023, arXiv 2211.08403"
_NATURE = "Dohare et al., Nature 2024, arXiv 2306.13812"


class PlasticityMonitor(Monitor):
    r"""Log how many units are silent, how rich the features are, and how large weights have grown.

    **Logged metrics**, ``plasticity/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    The last two are drawn of every layer with parameters, and of the whole model as ``all``; for the distance one copy
    of the parameters is kept, also in the state. A layer that fades as a whole has no dormant units: see its
    ``mean_activation``, and its ``std_ratio`` and ``magnitude_ratio`` to what the layer was at the first point, also
    over several fits of one callback: before and after pruning or averaging of weights, say. A unit that hardly varied
    at the first point weighs much in ``std_ratio``. Units that are clones the gradient no longer tells apart.

    A point rests on the training batches just before it, on four rows per feature, 1024 at least; the rank on as many
    of them as ``max_overhead`` allows: do not compare ranks of different models. Rows are those of
    :class:`~lightning_collapse.CollapseMonitor`: maps ``(N, C, H, W)`` count by their spatial mean.

    Args:
        layers: Names of submodules, or glob patterns of them; ``"name:input"`` is what a module receives. ``None``
            takes up to a dozen activation functions, see ``activation_taps``; where there are none the layers of
            ``default_taps``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        batches: How many batches a point rests on, at most.
        tau: Threshold of dormant units.
        max_dim: The rank of a layer with more features is that of a random projection to this many.
        distance: Whether to draw ``init_distance``.
        max_overhead: Share of the floating-point operations of training that the ranks may cost.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

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
    declares = (
        Curve(
            "dormant_fraction",
            "units whose mean activation is small beside that of their layer",
            "0 to 1",
            "growing",
            "Sokar et al., ICML 2023, arXiv 2302.12902",
        ),
        Curve(
            "dead_fraction",
            "units that are exactly zero on nearly all rows, which tells something behind a rectifier",
            "0 to 1",
            "growing",
            _NATURE,
        ),
        Curve("mean_activation", "mean of the absolute activation", "0 to infinity", "near 0"),
        Curve(
            "std_ratio",
            "standard deviation of each unit over that at the first point, mean over units",
            "0 to infinity; 1 is no change",
            "near 0",
            _MERGING,
        ),
        Curve(
            "magnitude_ratio",
            "mean of the absolute activation over that at the first point",
            "0 to infinity; 1 is no change",
            "near 0",
            "Qu & Horvath 2024, arXiv 2402.05966",
        ),
        Curve(
            "srank", "raw spectrum", "1 to min(n, d), an integer", "near 1", "Kumar et al., ICLR 2021, arXiv 2010.14498"
        ),
        Curve(
            "cloned_fraction",
            "units whose correlation with another one is beyond 0.95",
            "0 to 1",
            "growing",
            "Joudaki et al. 2025, arXiv 2510.00304",
        ),
        Curve("flag", "activations", "0 to 6", "above 0: why to doubt the point"),
        Curve("mean_weight", "mean of the absolute weight", "0 to infinity", "growing", _NATURE),
        Curve(
            "init_distance",
            "Euclidean distance of the weights from where the first fit began",
            "0 to infinity",
            "growing without end",
        ),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        every_n_steps: int | None = None,
        batches: int = 4,
        tau: float = 0.025,
        max_dim: int = 2048,
        distance: bool = True,
        max_overhead: float = 0.005,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "activations")
        if batches < 1:
            raise ValueError(f"`batches` must be at least 1, got {batches}.")
        if not tau >= 0:
            raise ValueError(f"`tau` must not be negative, got {tau}.")
        if max_dim < 2:
            raise ValueError(f"`max_dim` must be at least 2, got {max_dim}.")
        if not max_overhead > 0:
            raise ValueError(
                f"`max_overhead` is a share of the training cost and must be positive, got {max_overhead}."
            )
        self.max_overhead = max_overhead
        self.layers, self.batches, self.tau, self.max_dim, self.distance = layers, batches, tau, max_dim, distance
        self._sketches: dict[int, GaussianSketch] = {}
        self._parameters: dict[str, Tensor] = {}
        self._groups: dict[str, list[str]] = {}
        self._start: ParameterSnapshot | None = None
        self._saved: Mapping[str, Tensor] | None = None
        self._first: dict[str, Tensor] = {}

    @override
    def state(self) -> dict[str, Any]:
        start = {"start": self._start.state_dict()} if self._start is not None else {}
        return {**start, "first": dict(self._first)}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._saved, self._first = state.get("start"), dict(state.get("first", {}))

    @override
    def between(self, trainer: Trainer) -> int:
        return min(self.batches, super().between(trainer))

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_flattened(trainer, type(self).__name__)
        taps = self.choose_taps(self.layers, _default(pl_module), pl_module)
        self.window = FeatureWindow(
            pl_module,
            taps,
            pl_module.device,
            self._rows,
            max_overhead=self.max_overhead,
            limit=ROWS,
            containment=self.contained,
            choose=partial(_default, pl_module) if self.layers is None else None,
        )
        self._parameters = {
            name: parameter for name, parameter in pl_module.named_parameters() if not nn.parameter.is_lazy(parameter)
        }
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        modules = {tap.name: tap.module for tap in (taps if self.layers is not None else default_taps(pl_module))}
        groups = {
            name.removesuffix(".input"): [names[id(p)] for p in module.parameters() if id(p) in names]
            for name, module in modules.items()
        }
        self._groups = {name: members for name, members in groups.items() if members} | {"all": list(self._parameters)}

    @override
    def stop(self) -> None:
        self._parameters, self._groups = {}, {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.distance:
            saved, self._saved = self._saved, None
            if saved is None and self._start is not None:  # a callback that goes through several fits
                saved = self._start.state_dict()
            self._start = ParameterSnapshot(self._parameters, saved)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        layers = {} if self.window is None else self.window.features()
        return self._read_units(layers) | self._read_weights(pl_module.device)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points: list[Point] = []
        for tap in self.window.taps if self.window is not None else ():
            own = {key: numbers.get((tap.name, key), nan) for key in _UNITS}
            n, seen = (int(numbers.get((tap.name, key), 0)) for key in ("n", "seen"))
            flag = Flag.NOT_CALLED if not seen else Flag.FEW_ROWS if n < 2 else Flag.NONFINITE if n < seen else Flag.OK
            if flag == Flag.NOT_CALLED:
                self.warn_of_layer(tap.name)
            elif flag == Flag.OK and self.window is not None and self.window.plans[tap.name].width > self.max_dim:
                flag = Flag.SKETCHED
            own["flag"] = float(flag)
            points += [Point(self.family, tap.name, key, step, value, n, flag=flag) for key, value in own.items()]
        for name in self._groups:
            mean, square = numbers[name, "mean_weight"], numbers[name, "init_distance"]
            drawn = {"mean_weight": mean} | ({"init_distance": sqrt(square)} if self._start is not None else {})
            flag = Flag.OK if isfinite(mean) else Flag.NONFINITE
            points += [Point(self.family, name, key, step, value, flag=flag) for key, value in drawn.items()]
        return points

    def _rows(self, width: int) -> int:
        return max(ROWS, 4 * width) if width <= self.max_dim else ROWS

    def _read_units(self, layers: Mapping[str, LayerFeatures]) -> dict[Name, Tensor]:
        """What there is to say of units, over all processes. Collective."""
        if not layers:
            return {}
        sums, narrow = [], {}
        for name, layer in layers.items():
            dtype = accumulation_dtype(layer.rows.device)
            size, seen, kept = finite_rows(layer.rows, layer.mask, dtype)
            counts = torch.stack([kept.sum(), seen.to(dtype)])
            signed, absolute = kept @ size, kept @ size.abs_()
            squares, active = (
                kept @ size.square_(),
                kept @ size.sign_(),
            )  # in place: rows are what is large here
            sums.append(torch.cat([counts, absolute, active, signed, squares]))
            rows = layer.rows if layer.width <= self.max_dim else self._sketch(layer)
            most = self.window.affordable(rows.shape[1]) if self.window is not None else len(rows)
            expected = min(layer.expected, most * world_size())
            narrow[name] = LayerFeatures(evenly(rows, most), evenly(layer.mask, most), expected, layer.width)
        total = all_reduce_sum(torch.cat(sums))
        srank = replace(MEASURES["srank"], spectrum="raw")
        evaluated = evaluate(narrow, [srank, _CLONES])
        alike: dict[int, dict[str, Tensor]] = {}  # layers of one width are read together
        for name, part in zip(layers, torch.split(total, [len(x) for x in sums]), strict=True):
            alike.setdefault(len(part), {})[name] = part
        readings: dict[Name, Tensor] = {}
        for parts in alike.values():
            together = torch.stack(list(parts.values()))
            count, seen = together[:, 0], together[:, 1]
            means, active, signed, squares = (together[:, 2:] / count.unsqueeze(1)).chunk(4, dim=1)
            stds = (squares - signed.square()).clamp_min(0).sqrt()
            first = self._first_of(list(parts), torch.stack([means, stds], dim=1))
            values = [dormant_fraction(means, self.tau), dead_fraction(active), means.mean(dim=1)]
            values += [std_ratio(stds, first[:, 1]), magnitude_ratio(means, first[:, 0])]
            values += [
                torch.stack([evaluated[name].values[key] for name in parts]).to(count)
                for key in (srank.curve, _CLONES.curve)
            ]
            values = [*torch.where(count > 0, torch.stack(values), nan), count, seen]
            for key, column in zip((*_UNITS, "n", "seen"), values, strict=True):
                readings |= {(name, key): value for name, value in zip(parts, column.unbind(), strict=True)}
        return readings

    def _first_of(self, names: Sequence[str], now: Tensor) -> Tensor:
        """Mean sizes and standard deviations at the first point that had any, ``(L, 2, n)``; known without a wait."""
        for name, own in zip(names, now, strict=True):
            first = self._first.get(name, own)
            first = first.to(own) if first.shape == own.shape else own
            self._first[name] = torch.where(first.isnan(), own, first)
        return torch.stack([self._first[name] for name in names])

    def _sketch(self, layer: LayerFeatures) -> Tensor:
        if layer.width not in self._sketches:
            self._sketches[layer.width] = GaussianSketch(layer.width, self.max_dim, layer.rows.device)
        return self._sketches[layer.width](layer.rows)

    def _read_weights(self, device: torch.device) -> dict[Name, Tensor]:
        """Mean absolute weight and squared distance of every group, of all processes. Collective."""
        absolute = absolute_sums(list(self._parameters.values())).to(device)
        square = (
            self._start.change(self._parameters, order=2) if self._start is not None else torch.zeros_like(absolute)
        )
        both = all_reduce_sum(torch.stack([absolute, square.to(absolute)], dim=1))
        places = {name: i for i, name in enumerate(self._parameters)}
        readings: dict[Name, Tensor] = {}
        for group, members in self._groups.items():
            size = sum(self._parameters[name].numel() for name in members)
            total = both[torch.tensor([places[name] for name in members], device=device)].sum(dim=0)
            readings |= {(group, "mean_weight"): total[0] / size, (group, "init_distance"): total[1]}
        return readings


def _clones(rows: Tensor, mask: Tensor) -> Tensor:
    return cloned_fraction(evenly(rows, CLONE_ROWS), evenly(mask, CLONE_ROWS))


_CLONES = Measure("cloned_fraction", _clones, kind="rows", spectrum="raw", sketchable=False)


def _default(root: nn.Module, order: Execution | None = None) -> list[Tap]:
    return activation_taps(root, order) or default_taps(root, order)
