"""Update monitor: how far optimizer steps go, whether they agree, and how sharp the loss is where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite, nan, sqrt
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_collapse.callbacks.monitors.loss_curvature import LossCurvature
from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.monitoring.update_reader import COLUMNS, UpdateReader
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.modules import clean_name, curve_name, default_taps, find_modules
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.trainer import is_due, refuse_flattened

LARGE = 1024
"""Entries from which on the RMS ratio of a tensor is read: of smaller ones it is mostly noise."""
_STEP, _EDGE = "optimizer step", "Cohen et al. 2022, arXiv 2207.14484"


class UpdateMonitor(Monitor):
    r"""Log how far an optimizer step moves the weights, whether successive steps agree, and how stale Adam's memory is.

    **Logged metrics**, ``updates/{layer}/...`` and, with ``sharpness``, ``sharpness/all/...``, to every logger and to
    ``trainer.callback_metrics``:

    {curves}

    Drawn of every layer and, as ``all``, of the whole model. ``rms_ratio`` is that of the layer's tensor where it is
    largest, among those of 1,024 entries or more, and is there only where the optimizer keeps second moments;
    ``swallowed`` only where weights have 16 bits. What independent gradients would read is the null: :math:`\beta_1`
    of ``cosine``, a little below 1 of ``rms_ratio``. Well below it ``cosine`` oscillates, above it the weights drift.

    ``ratio`` is of all parameters of a layer, biases and norms too, over the weights before the step, and stays on
    shards; ``relative_norm`` of :class:`~lightning_collapse.WeightSpectrumMonitor` is of one weight matrix in effect.

    An update is what one step of one optimizer does to the parameters it updates; of several steps in a batch the last
    counts. A step that a gradient scaler skips has no point. Step the optimizers that ``self.optimizers()`` returns.
    The watched weights are copied right before the step of a point and the one before it; besides the copy one update
    is kept between these two.

    ``sharpness`` costs ten gradients at a point, twenty with Adam, and four times that at the first: largest curvature
    of the loss that ``training_step`` returns for the fit's first batch, in evaluation mode, without terms that
    callbacks add, by :class:`~lightning_collapse.monitoring.sharpness.Sharpness`. ``raw`` is that of the Hessian,
    ``preconditioned`` that of Adam's step. Beyond ``edge`` steps overshoot, and to hover there is normal.

    Args:
        layers: Names of submodules or of parameters, or glob patterns of them; all parameters inside count. ``None``
            takes up to a dozen submodules by the rule of ``default_taps``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        sharpness: Whether to read it; it needs whole weights of 32 bits or more and automatic optimization.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing, for ``strategy="fsdp"``, whose flattened weights belong to no layer, and for
            ``sharpness`` where it cannot be read.

    References:
        Wortsman et al., 2023, https://arxiv.org/abs/2304.13013; Cohen et al., 2022, https://arxiv.org/abs/2207.14484.

    Example::

        trainer = Trainer(callbacks=[UpdateMonitor()])
    """

    family = "updates"
    declares = (
        Curve("ratio", "norm of the update over that of the weights", "0 to infinity", "above 0.01"),
        Curve("cosine", "cosine of two successive updates", "-1 to 1", "far from its null"),
        Curve(
            "rms_ratio",
            "root mean square of gradients over the root of Adam's second moments",
            "0 to the root of 1 / (1 - beta2)",
            "above 2.3",
            "Wortsman et al. 2023, arXiv 2304.13013",
        ),
        Curve(
            "swallowed", "share of 16-bit weights with a gradient that the step left as they were", "0 to 1", "near 1"
        ),
        Curve("raw", "largest curvature of the loss", "any number", "above edge, of SGD", _EDGE, family="sharpness"),
        Curve(
            "preconditioned",
            "largest curvature of the loss in the units of Adam's step",
            "any number",
            "above edge",
            _EDGE,
            family="sharpness",
        ),
        Curve(
            "edge",
            "curvature beyond which steps overshoot, by learning rate and momentum",
            "0 to infinity",
            "does not tell",
            _EDGE,
            family="sharpness",
        ),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        every_n_steps: int | None = None,
        sharpness: bool = False,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "the default layers")
        self.layers = layers
        self.sharpness = sharpness
        self._forget()

    def _forget(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._groups: dict[str, list[int]] = {}
        self._reader: UpdateReader | None = None
        self._curvature: LossCurvature | None = None
        self._handles: list[RemovableHandle] = []
        self._announced = False

    @override
    def state(self) -> dict[str, Any]:
        own = {} if self._reader is None else {"earlier": self._reader.state()}
        return own | ({} if self._curvature is None else {"curvature": self._curvature.state()})

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        if self._reader is not None:
            self._reader.restore(state.get("earlier", {}))
        if self._curvature is not None and "curvature" in state:
            self._curvature.restore(state["curvature"])

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_flattened(trainer, type(self).__name__)
        self._forget()
        self._parameters = list(pl_module.parameters())
        self._groups = self._choose(pl_module)
        watched = sorted({i for members in self._groups.values() for i in members})
        self._parameters = [self._parameters[i] for i in watched]
        places = {old: new for new, old in enumerate(watched)}
        self._groups = {name: [places[i] for i in members] for name, members in self._groups.items()}
        self._reader = UpdateReader(self._parameters)
        if self.sharpness:
            self._curvature = LossCurvature(trainer, pl_module)

    @override
    def stop(self) -> None:
        self._let_go()
        if self._reader is not None:
            self._reader.clear()
        self._forget()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._curvature is not None:
            self._curvature.keep(batch)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._reader is None or self._left < 0:
            return
        due, keep = is_due(trainer, self._every), is_due(trainer, self.cadence(trainer), ahead=1)
        if not due and not keep:
            return
        reader, self._announced = self._reader, True

        @torch.compiler.disable  # type: ignore[untyped-decorator]  # nor is a hook of Lightning's
        def after(*_: Any) -> None:
            with self.contained("reading an update", "points may be missing"):
                reader.after(optimizer, due, keep)

        with self.contained("copying weights before a step", "points may be missing"):
            reader.before(optimizer)
            # a step that a scaler skips never calls it
            self._handles.append(optimizer.register_step_post_hook(after))

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        self._let_go()

    @override
    @torch.no_grad()
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Sums of every parameter, by column, and the sharpness."""
        if self._reader is None:
            return {}
        table = self._reader.sums(pl_module.device)
        readings = {("", name): column for name, column in zip(COLUMNS, table.unbind(dim=1), strict=True)}
        if self._curvature is not None:
            readings |= self._curvature.read(trainer, pl_module)
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points = [
            Point("sharpness", layer, measure, step, value, flag=Flag.OK if isfinite(value) else Flag.NONFINITE)
            for (layer, measure), value in numbers.items()
            if layer
        ]
        sums = {name: numbers["", name] for name in COLUMNS}
        if not any(sums["known"]):
            if not self._announced:
                self.warn_once(
                    "no optimizer step was announced before a point, so there is no update to read. Under manual"
                    " optimization step the optimizers that `self.optimizers()` returns."
                )
            return points
        if any(sums["bad"]) and not any(sums["update"]):  # skipped inside of a fused step
            return points
        for name, members in self._groups.items():
            points += self._points_of(name, step, members, sums)
        return points

    def _points_of(
        self, name: str, step: int, members: Sequence[int], sums: Mapping[str, Sequence[float]]
    ) -> list[Point]:
        members = [i for i in members if sums["known"][i]]
        total = {column: sum(sums[column][i] for i in members) for column in COLUMNS}
        flag = Flag.NOT_CALLED if not members else Flag.NONFINITE if total["bad"] else Flag.OK
        flag = flag or (Flag.OK if isfinite(total["update"] + total["weight"]) else Flag.NONFINITE)
        found = {"ratio": (_root(_over(total["update"], total["weight"])), nan)}
        facts = [self._reader.facts[i] for i in members if i in self._reader.facts] if self._reader else []
        norms = sqrt(max(total["earlier"], 0.0)) * sqrt(max(total["update"], 0.0)) if flag == Flag.OK else nan
        found["cosine"] = (_over(total["product"], norms), _common([fact.cosine for fact in facts]))
        with_memory = [i for i in members if sums["second"][i]]
        if with_memory:
            large = [i for i in with_memory if sums["second"][i] >= LARGE]
            large = large or [max(with_memory, key=lambda i: sums["second"][i])]
            ratios = {i: _root(_over(sums["stale"][i], sums["second"][i])) for i in large}
            worst = max(ratios, key=lambda i: (ratios[i] != ratios[i], ratios[i]))
            null = self._reader.facts[worst].rms if self._reader and worst in self._reader.facts else nan
            found["rms_ratio"] = (ratios[worst], null)
        if total["asked"]:
            found["swallowed"] = (total["lost"] / total["asked"], nan)
        return [
            Point(self.family, name, key, step, value if isfinite(value) else nan, null=null, flag=flag)
            for key, (value, null) in found.items()
        ]

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _choose(self, pl_module: LightningModule) -> dict[str, list[int]]:
        """Which parameters each layer has, by their places."""
        index = {id(parameter): i for i, parameter in enumerate(pl_module.parameters())}
        named = {clean_name(name): [index[id(p)]] for name, p in pl_module.named_parameters()}
        if self.layers is None:
            modules = {tap.name.removesuffix(".input"): tap.module for tap in default_taps(pl_module)}
        else:
            modules = {}
            for pattern in self.layers:
                if any(fnmatchcase(name, pattern) for name in named):
                    continue
                try:
                    modules |= find_modules(pl_module, [pattern])
                except ValueError as error:
                    call = f"`UpdateMonitor(layers={list(self.layers)!r})`"
                    raise MisconfigurationException(f"{call}: {error} Names of parameters count too.") from error
            chosen = [name for name in named if any(fnmatchcase(name, pattern) for pattern in self.layers)]
            named = {name: named[name] for name in chosen}
        groups = {curve_name(name): [index[id(p)] for p in module.parameters()] for name, module in modules.items()}
        groups |= {curve_name(name): members for name, members in named.items()} if self.layers is not None else {}
        trained = {i for i, p in enumerate(pl_module.parameters()) if p.requires_grad}
        groups = {name: [i for i in members if i in trained] for name, members in groups.items()}
        return {name: members for name, members in groups.items() if members} | {"all": list(index.values())}


def _over(number: float, by: float) -> float:
    return number / by if by else nan


def _root(number: float) -> float:
    return sqrt(number) if number >= 0 else nan


def _common(values: Sequence[float]) -> float:
    """What all of them are; NaN if they differ."""
    return values[0] if values and all(value == values[0] for value in values) else nan
