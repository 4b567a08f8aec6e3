"""Intrinsic dimension monitor: the dimension of the surface that the features of a layer lie on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import nan
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.intrinsic_dimension import local_dimension_of_distances, two_nn_of_distances
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.spectral.neighbors import nearest_distances
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.distributed import all_gather_rows
from lightning_collapse.utilities.modules import default_taps
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve

MAX_DIM = 2048
SELDOM = 10
_WIDTH, _FALLS = "0 to the layer's width", "falls; NaN once all rows are equal"


class IntrinsicDimensionMonitor(Monitor):
    """Log how many coordinates it takes to tell neighbouring rows of a layer's output apart.

    Ranks count the directions that a cloud of rows spreads in; this counts the dimensions of the surface it lies on,
    which may be bent through all of them. **Logged metrics**, ``intrinsic_dimension/{layer}/...``, to
    every logger and to ``trainer.callback_metrics``; see :func:`~lightning_collapse.functional.two_nn` and
    :func:`~lightning_collapse.functional.local_intrinsic_dimension`:

    {curves}

    A point rests on the training batches right before it. Both estimates are too low above a dimension of about 15 and
    depend on the number of rows: a collapse is a fall at one ``n``. Layers wider than 2048 are watched through a random
    projection.

    Args:
        layers: Names of submodules, or glob patterns of them; ``"name:input"`` is what a module receives instead of
            what it returns. ``None`` takes up to a dozen by the rule of ``default_taps``.
        every_n_steps: Optimizer steps between two points. ``None`` is ten times ``Trainer(log_every_n_steps)``: a point
            on a dozen layers costs as much as several steps of a small model.
        rows: Rows per layer and point, over all processes. The cost of a point grows with its square.
        k: Neighbours of ``lid``.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing.

    Example::

        trainer = Trainer(callbacks=[IntrinsicDimensionMonitor()])
    """

    family = "intrinsic_dimension"
    declares = (
        Curve(
            "two_nn",
            "ratio of the distances to the two nearest rows",
            _WIDTH,
            _FALLS,
            "Facco et al. 2017, Scientific Reports 7",
        ),
        Curve(
            "lid",
            "distances to the k nearest rows",
            _WIDTH,
            _FALLS,
            "Levina & Bickel 2004; Huang et al. 2024, arXiv 2401.10474",
        ),
        Curve("n", "different finite rows behind the point, over all processes"),
        Curve("ties", "rows left out: they repeat another one, or their two nearest are equally far"),
        Curve("flag", "0, or why to doubt the point"),
    )
    identity = ("layers", "every_n_steps", "rows", "k")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        every_n_steps: int | None = None,
        rows: int = 512,
        k: int = 20,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "the default layers")
        for name, number in (("rows", rows), ("k", k)):
            if number < 3:
                raise ValueError(f"`{name}` must be at least 3, got {number}.")
        self.layers = layers
        self.rows = rows
        self.k = k

    @override
    def cadence(self, trainer: Trainer) -> int:
        return super().cadence(trainer) * (SELDOM if self.every_n_steps is None else 1)

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        taps = self.choose_taps(self.layers, default_taps(pl_module), pl_module)
        self.window = FeatureWindow(
            pl_module,
            taps,
            pl_module.device,
            self.rows,
            max_dim=MAX_DIM,
            limit=self.rows,
            containment=self.contained,
            choose=partial(default_taps, pl_module) if self.layers is None else None,
        )

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        readings: dict[Name, Tensor] = {}
        for name, layer in self.window.features().items() if self.window is not None else ():
            rows = layer.rows.to(accumulation_dtype(layer.rows.device))  # the same on every process, whatever came
            rows, mask = all_gather_rows(rows, layer.mask)
            found = nearest_distances(rows, self.k, mask)
            dimension, n, ties = two_nn_of_distances(*found)
            local = local_dimension_of_distances(*found).dimension
            own = {"two_nn": dimension, "lid": local, "n": n, "ties": ties}
            own |= {"different": found[1].sum(), "repeated": found[2].sum(), "seen": mask.sum()}
            readings |= {(name, key): value for key, value in own.items()}
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points: list[Point] = []
        for tap in self.window.taps if self.window is not None else ():
            plan = self.window.plans.get(tap.name) if self.window is not None else None
            own = {key: numbers.get((tap.name, key), nan) for key in ("two_nn", "lid")}
            own |= {key: numbers.get((tap.name, key), 0.0) for key in ("n", "ties")}
            different, repeated, seen = (numbers.get((tap.name, key), 0) for key in ("different", "repeated", "seen"))
            flag = _flag(different, different + repeated, seen, plan is not None and plan.width > MAX_DIM)
            own["flag"] = float(flag)
            points += [
                Point(self.family, tap.name, key, step, value, int(own["n"]), flag=flag) for key, value in own.items()
            ]
            if flag == Flag.NOT_CALLED:
                self.warn_of_layer(tap.name)
        return points


def _flag(different: float, finite: float, seen: float, sketched: bool) -> Flag:
    if not seen:
        return Flag.NOT_CALLED
    if finite > 1 and different == 1:
        return Flag.CONSTANT
    if different < 3:
        return Flag.FEW_ROWS
    return Flag.NONFINITE if finite < seen else Flag.SKETCHED if sketched else Flag.OK
