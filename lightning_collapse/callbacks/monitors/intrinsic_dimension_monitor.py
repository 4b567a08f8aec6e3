"""Curves of the intrinsic dimension of layers while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Monitor, check_layers
from lightning_collapse.functional.intrinsic_dimension import local_dimension_of_distances, two_nn_of_distances
from lightning_collapse.monitoring.feature_buffer import FeatureBuffer
from lightning_collapse.monitoring.feature_hooks import Captured, FeatureHooks
from lightning_collapse.monitoring.sampling_plan import SamplingPlan, captured_shapes
from lightning_collapse.spectral.neighbors import nearest_distances
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_gather_rows, max_over_processes, world_size
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.modules import Tap, default_taps, find_taps, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import register_curve

FAMILY = "intrinsic_dimension"
MAX_DIM = 2048
SELDOM = 10

for _name, _facts in {
    "two_nn": {
        "reads": "distances to the two nearest rows",
        "range": "0 to the layer's width",
        "collapsed": "falls; NaN once all rows are equal",
        "source": "Facco et al. 2017, Scientific Reports 7",
    },
    "lid": {
        "reads": "distances to the k nearest rows",
        "range": "0 to the layer's width",
        "collapsed": "falls; NaN once all rows are equal",
        "source": "Levina & Bickel 2004; Huang et al. 2024, arXiv 2401.10474",
    },
    "n": {"reads": "different rows behind the point"},
    "ties": {"reads": "rows left out: they repeat another one, or their two nearest are equally far"},
    "flag": {"reads": "0, or why to doubt the point"},
}.items():
    register_curve(FAMILY, _name, **_facts)


class IntrinsicDimensionMonitor(Monitor):
    """Log how many coordinates it takes to tell neighbouring rows of a layer's output apart.

    Ranks count the directions that a cloud of rows spreads in; this counts the dimensions of the surface it lies on,
    which may be bent through all of them. **Logged metrics**, to every logger and to ``trainer.callback_metrics``:

    - ``intrinsic_dimension/{layer}/two_nn``: from the ratio of the distances to the two nearest rows, see
      :func:`~lightning_collapse.functional.two_nn`;
    - ``intrinsic_dimension/{layer}/lid``: from ``k`` nearest rows, see
      :func:`~lightning_collapse.functional.local_intrinsic_dimension`;
    - ``intrinsic_dimension/{layer}/n``, ``ties``: different finite rows behind the point, over all processes, and how
      many were left out because they tie with others;
    - ``intrinsic_dimension/{layer}/flag``: 0, or why to doubt the point, see
      :class:`~lightning_collapse.utilities.Flag`.

    A point rests on the training batches right before it. Both estimates are too low above a dimension of about 15 and
    depend on the number of rows: a collapse is a fall at one ``n``. Layers wider than 2048 are watched through a random
    projection.

    Args:
        layers: Names of submodules, or glob patterns of them; ``"name:input"`` is what a module receives instead of
            what it returns. ``None`` takes up to a dozen by the rule of
            :func:`~lightning_collapse.utilities.default_taps`.
        every_n_steps: Optimizer steps between two points. ``None`` is ten times ``Trainer(log_every_n_steps)``: a point
            on a dozen layers costs as much as several steps of a small model.
        rows: Rows per layer and point, over all processes. The cost of a point grows with its square.
        k: Neighbours of ``lid``.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing.

    Example::

        trainer = Trainer(callbacks=[IntrinsicDimensionMonitor()])
    """

    family = FAMILY

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        every_n_steps: int | None = None,
        rows: int = 512,
        k: int = 20,
    ) -> None:
        super().__init__(every_n_steps)
        check_layers(layers, "the default layers")
        for name, number in (("rows", rows), ("k", k)):
            if number < 3:
                raise ValueError(f"`{name}` must be at least 3, got {number}.")
        self.layers = layers
        self.rows = rows
        self.k = k
        self._restored: dict[str, Any] = {}
        self._taps: list[Tap] = []
        self._heard: FeatureHooks | None = None
        self._plans: dict[str, SamplingPlan] = {}
        self._planned = False
        self._points = 0
        self._store = FeatureBuffer(MAX_DIM)

    @override
    def cadence(self, trainer: Trainer) -> int:
        return super().cadence(trainer) * (SELDOM if self.every_n_steps is None else 1)

    @property
    @override
    def state_key(self) -> str:
        layers = None if self.layers is None else list(self.layers)
        return self._generate_state_key(layers=layers, every_n_steps=self.every_n_steps, rows=self.rows, k=self.k)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "plans": {name: list(plan) for name, plan in self._plans.items()},
            "rows": self._store.state_dict(),
            "points": self._points,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._taps = self._choose(pl_module)
        names = [tap.name for tap in self._taps]
        let_hooks_be_seen(pl_module)
        self._heard = FeatureHooks(self._taps, self.rows)
        self._plans, self._planned, self._points = {}, False, 0
        if state := self._restored:
            self._restored = {}
            self._plans = {name: SamplingPlan(*plan) for name, plan in state["plans"].items() if name in names}
            self._planned, self._points = bool(self._plans), state["points"]
            if world_size() == 1:  # a checkpoint holds the rows of one process: with several the window starts anew
                self._store.load_state_dict(state["rows"], names, pl_module.device)

    @override
    def stop(self) -> None:
        if self._heard is not None:
            self._heard.remove()
        self._heard = None
        self._store.clear()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        window = max((plan.batches for plan in self._plans.values()), default=1)
        # the first batch of a fit is heard for its shapes
        if self._heard is not None and (not self._planned or batches_left < window):
            self._heard.armed = True
            self._heard.mask = padding_mask(batch)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._heard is None or not self._heard.armed:
            return
        self._heard.armed = False
        heard = self._heard.pop()
        # a layer may run later than in the first batch
        if not self._planned or (batches_left == 0 and len(self._plans) < len(self._taps)):
            self._planned = True
            self._plan(trainer, heard, pl_module.device)
        for name, of_layer in heard.items():
            plan = self._plans.get(name)
            if plan is not None and batches_left < plan.batches:
                self._store.add(name, of_layer.rows, of_layer.mask, plan.rows_per_batch)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> list[Point]:
        readings = []
        for name, plan in self._plans.items():
            # every process must bring every layer, if only its width
            rows, mask = self._store.read(name, min(plan.width, MAX_DIM), pl_module.device)
            rows = rows.to(accumulation_dtype(rows.device))  # the same on every process, whatever came
            readings.append(_read(*all_gather_rows(rows, mask), self.k))
        self._store.clear()
        self._points += 1
        numbers = torch.stack(readings).tolist() if readings else []  # the one transfer of a point
        of_layers = dict(zip(self._plans, numbers, strict=True))
        points: list[Point] = []
        for tap in self._taps:
            wide = tap.name in self._plans and self._plans[tap.name].width > MAX_DIM
            points += _points((FAMILY, tap.name), step, of_layers.get(tap.name, []), wide)
            if points[-1].flag == Flag.NOT_CALLED:
                self.warn_once(
                    f"layer `{tap.name}` did not run before every point; its curves read NaN there. If it is one that"
                    " never runs choose other `layers`."
                )
        return points

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._taps and not self._points:
            self.warn_of_no_point(trainer)

    def _choose(self, pl_module: LightningModule) -> list[Tap]:
        if self.layers is None:
            return default_taps(pl_module)
        try:
            return find_taps(pl_module, self.layers)
        except ValueError as error:
            raise MisconfigurationException(
                f"`IntrinsicDimensionMonitor(layers={list(self.layers)!r})`: {error}"
            ) from error

    def _plan(self, trainer: Trainer, heard: Mapping[str, Captured], device: torch.device) -> None:
        """Decide how rows are collected, from what one batch brought.

        Collective: every process calls it after its first batch, and at points while a layer has not run yet.
        """
        # waits for the device off the step path: it happens once, as a rule
        numbers = [int(x) for x in max_over_processes(captured_shapes(self._taps, heard), device)]
        between = (self.cadence(trainer) or 1) * trainer.accumulate_grad_batches
        for tap, per_batch, width in zip(self._taps, numbers[::2], numbers[1::2], strict=True):
            if per_batch and tap.name not in self._plans:
                self._plans[tap.name] = SamplingPlan.make(self.rows, width, per_batch, between)


def _read(rows: Tensor, mask: Tensor, k: int) -> Tensor:
    """Both dimensions, rows behind the first, ties, different rows, finite rows, considered rows."""
    found = nearest_distances(rows, k, mask)
    dimension, n, ties = two_nn_of_distances(*found)
    local = local_dimension_of_distances(*found).dimension
    different, repeated = found[1].sum(), found[2].sum()
    return torch.stack([dimension, local, n, ties, *(x.to(n) for x in (different, different + repeated, mask.sum()))])


def _points(key: tuple[str, str], step: int, numbers: Sequence[float], sketched: bool) -> list[Point]:
    two, lid, n, ties, different, finite, seen = numbers or [nan, nan, 0.0, 0.0, 0.0, 0.0, 0.0]
    flag = _flag(int(different), int(finite), int(seen), sketched)
    values = {"two_nn": two, "lid": lid, "n": n, "ties": ties, "flag": float(flag)}
    return [Point(*key, name, step, value, int(n), flag=flag) for name, value in values.items()]


def _flag(different: int, finite: int, seen: int, sketched: bool) -> Flag:
    if not seen:
        return Flag.NOT_CALLED
    if finite > 1 and different == 1:
        return Flag.CONSTANT
    if different < 3:
        return Flag.FEW_ROWS
    return Flag.NONFINITE if finite < seen else Flag.SKETCHED if sketched else Flag.OK
