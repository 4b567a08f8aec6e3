"""Curves of the geometry of layers while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Monitor, check_layers
from lightning_collapse.functional.isotropic_null import expected_under_isotropy
from lightning_collapse.monitoring.evaluate import LayerRows, flag_of, read
from lightning_collapse.monitoring.feature_buffer import FeatureBuffer
from lightning_collapse.monitoring.feature_hooks import Captured, FeatureHooks
from lightning_collapse.monitoring.sampling_plan import SamplingPlan, captured_shapes
from lightning_collapse.monitoring.training_flops import TrainingFlops
from lightning_collapse.reporting import (
    LOG10_EDGES,
    History,
    heat_map,
    log10_histogram,
    log_histogram,
    log_image,
    log_text,
)
from lightning_collapse.spectral.cost import rows_within
from lightning_collapse.utilities.distributed import max_over_processes, world_size
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.modules import (
    Tap,
    default_taps,
    find_taps,
    is_compiled,
    let_hooks_be_seen,
    weighted_layers,
)
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import MEASURES, Measure, get_measure
from lightning_collapse.utilities.trainer import logging_step

PICTURE_EVERY = 10


class CollapseMonitor(Monitor):
    """Log how many directions the outputs of chosen layers use, and how far they spread.

    **Logged metrics**, one curve per layer, to every logger and to ``trainer.callback_metrics``:

    - ``collapse/{layer}/{measure}`` for every measure;
    - ``collapse/{layer}/n``: the number of rows behind them, over all processes: never compare ranks at different n;
    - ``collapse/{layer}/nonfinite_fraction``: share of rows left out for NaN or infinity;
    - ``collapse/{layer}/flag``: 0, or why to doubt the point, see :class:`~lightning_collapse.utilities.Flag`;
    - ``val/collapse/...``: the same of the validation batches, with ``validation=True``.

    Besides, to loggers that can show them, every tenth point: a histogram of log10 standard deviations along the
    principal axes per layer, and a picture of the first measure over layers and steps.

    A point rests on a window of the training batches just before it: as many as four rows per feature need, as long
    as that costs no more than ``max_overhead`` of the training. Vectors ``(N, D)`` count as they are, tokens
    ``(N, L, D)`` each by itself (those with a zero in ``batch["attention_mask"]`` not at all), maps ``(N, C, H, W)``
    by their spatial mean.

    Args:
        layers: Names of submodules, or glob patterns of them; ``"name:input"`` is what a module receives instead of
            what it returns. ``None`` takes up to a dozen by the rule of
            :func:`~lightning_collapse.utilities.default_taps`.
        measures: Names of registered measures (``python -m lightning_collapse measures`` lists them), or ``"all"``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows per layer and point, over all processes, instead of the automatic number.
        max_overhead: Share of the floating-point operations of training that the points may cost, which bounds the
            automatic number of rows (from below by 64).
        max_dim: A layer with more features is watched through a random projection to this many.
        validation: Also make a point of every validation epoch during the fit.

    Raises:
        ValueError: On an unknown measure or an argument out of range; when the fit starts, as
            ``MisconfigurationException``, on a pattern that matches nothing.

    Example::

        trainer = Trainer(callbacks=[CollapseMonitor()])
    """

    family = "collapse"

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        measures: Sequence[str] | Literal["all"] = (
            "effective_rank",
            "eigenvalue_effective_rank",
            "feature_std",
            "relative_spread",
            "direction_spread",
        ),
        every_n_steps: int | None = None,
        rows: int | None = None,
        max_overhead: float = 0.005,
        max_dim: int = 2048,
        validation: bool = False,
    ) -> None:
        super().__init__(every_n_steps)
        check_layers(layers, "the default layers")
        if rows is not None and rows < 2:
            raise ValueError(f"`rows` must be at least 2, or None for the automatic number, got {rows}.")
        if not max_overhead > 0:
            raise ValueError(
                f"`max_overhead` is a share of the training cost and must be positive, got {max_overhead}."
            )
        if max_dim < 2:
            raise ValueError(f"`max_dim` must be at least 2, got {max_dim}.")
        self.layers = layers
        self.measures = measures
        self.rows = rows
        self.max_overhead = max_overhead
        self.max_dim = max_dim
        self.validation = validation
        self._names = [measure.name for measure in _measures(measures)]
        self._taps: list[Tap] = []
        self._heard: FeatureHooks | None = None
        self._flops: TrainingFlops | None = None
        self._restored: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._plans: dict[str, SamplingPlan] = {}
        self._rows_per_batch: dict[str, int] = {}
        self._batch_flops = 0
        self._points = 0
        self._history = History()
        self._store = FeatureBuffer(self.max_dim)
        self._validation_store = FeatureBuffer(self.max_dim)

    @property
    def _measures(self) -> list[Measure]:
        # looked up and not kept: a callback travels to spawned processes, and a measure may be a lambda's
        return [get_measure(name) for name in self._names]

    @property
    @override
    def curves(self) -> list[str]:
        """Names of the measures it draws, and of what goes with them."""
        return [*(measure.curve for measure in self._measures), "n", "nonfinite_fraction", "flag"]

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layers=self.layers, measures=self.measures, every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "plans": {name: list(plan) for name, plan in self._plans.items()},
            "batch_flops": self._batch_flops,
            "points": self._points,
            "history": self._history.state_dict(),
            "rows": self._store.state_dict(),
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
        self._flops = TrainingFlops(pl_module)
        self._reset()
        if state := self._restored:
            self._restored = {}
            self._plans = {name: SamplingPlan(*plan) for name, plan in state["plans"].items() if name in names}
            self._batch_flops, self._points = state["batch_flops"], state["points"]
            self._history.load_state_dict(state["history"])
            if world_size() == 1:  # a checkpoint holds the rows of one process: with several the window starts anew
                self._store.load_state_dict(state["rows"], names, pl_module.device)
        if self.layers is None:
            rank_zero_info(
                f"`CollapseMonitor` watches {', '.join(names) or 'nothing: no layer holds a weight'}."
                " Choose others with `layers=[...]`."
            )

    @override
    def stop(self) -> None:
        for listener in (self._heard, self._flops):
            if listener is not None:
                listener.remove()
        self._heard = self._flops = None
        self._store.clear()
        self._validation_store.clear()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._flops is not None:
            self._flops.total = 0  # the sanity check has run through the model too
        # the first batch of a fit is heard for its shapes
        if self._flops is not None or batches_left < self._window():
            self._listen(batch, self._rows_per_batch)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._heard is None or not self._heard.armed:
            return
        self._heard.armed = False
        heard = self._heard.pop()
        if self._flops is not None:
            self._flops.remove()
            weights = sum(p.numel() for _, layer in weighted_layers(pl_module) for p in layer.parameters())
            positions = max((of_layer.returned for of_layer in heard.values()), default=0)
            self._batch_flops = self._batch_flops or self._flops.total or 6 * weights * positions
        # a layer may run later than in the first batch
        if self._flops is not None or (batches_left == 0 and len(self._plans) < len(self._taps)):
            self._flops = None
            self._plan(trainer, heard, pl_module.device)
            if not is_compiled(pl_module):  # a limit that changes would have it compiled anew
                self._rows_per_batch = {name: plan.rows_per_batch for name, plan in self._plans.items()}
        for name, of_layer in heard.items():
            plan = self._plans.get(name)
            if plan is not None and batches_left < plan.batches:
                self._store.add(name, of_layer.rows, of_layer.mask, plan.rows_per_batch)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> list[Point]:
        pictures = bool(trainer.loggers) and self._points % PICTURE_EVERY == 0
        points = self._read(trainer, pl_module.device, self._store, step, "collapse", pictures)
        self._points += 1
        self._remember(points, step)
        if pictures:
            self._draw(trainer, step)
        return points

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.validation and not trainer.sanity_checking:
            self._listen(batch, {})

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._heard is None or not self._heard.armed:
            return
        self._heard.armed = False
        batches = sum(trainer.num_val_batches)
        for name, heard in self._heard.pop().items():
            if (plan := self._plans.get(name)) is not None and len(self._validation_store) < plan.rows:
                rows_per_batch = (
                    plan.rows_per_batch if batches == float("inf") else -(-plan.rows // max(int(batches), 1))
                )
                self._validation_store.add(name, heard.rows, heard.mask, rows_per_batch)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validation and self._heard is not None and not trainer.sanity_checking:
            step = logging_step(trainer)
            points = self._read(trainer, pl_module.device, self._validation_store, step, "val/collapse", False)
            self.publish(trainer, pl_module, points)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._points:
            self._draw(trainer, logging_step(trainer))
        else:
            self.warn_of_no_point(trainer)

    def _choose(self, pl_module: LightningModule) -> list[Tap]:
        if self.layers is None:
            return default_taps(pl_module)
        try:
            return find_taps(pl_module, self.layers)
        except ValueError as error:
            raise MisconfigurationException(f"`CollapseMonitor(layers={list(self.layers)!r})`: {error}") from error

    def _listen(self, batch: Any, limits: Mapping[str, int]) -> None:
        if self._heard is not None:
            self._heard.armed = True
            self._heard.mask = padding_mask(batch)
            if self._rows_per_batch:
                self._heard.limits = limits

    def _window(self) -> int:
        return max((plan.batches for plan in self._plans.values()), default=1)

    def _plan(self, trainer: Trainer, heard: Mapping[str, Captured], device: torch.device) -> None:
        """Decide how rows are collected, from what one batch brought.

        Collective: every process calls it after its first batch, and at points while a layer has not run yet.
        """
        # waits for the device off the step path: it happens once, as a rule
        self._batch_flops, *numbers = map(
            int, max_over_processes([self._batch_flops, *captured_shapes(self._taps, heard)], device)
        )
        between = (self.cadence(trainer) or 1) * trainer.accumulate_grad_batches
        budget = self.max_overhead * self._batch_flops * between / max(len(self._taps), 1)
        for tap, per_batch, width in zip(self._taps, numbers[::2], numbers[1::2], strict=True):
            if per_batch and tap.name not in self._plans:
                rows = self.rows or rows_within(budget, min(width, self.max_dim))
                self._plans[tap.name] = SamplingPlan.make(rows, width, per_batch, between)

    def _read(
        self, trainer: Trainer, device: torch.device, store: FeatureBuffer, step: int, family: str, pictures: bool
    ) -> list[Point]:
        """Points of all layers. Collective."""
        layers = {}
        for name, plan in self._plans.items():
            rows, mask = store.read(name, min(plan.width, self.max_dim), device)
            if len(rows) or world_size() > 1:  # every process must bring every layer, if only its width
                layers[name] = LayerRows(rows, mask, plan.rows * world_size(), plan.width > self.max_dim)
        store.clear()
        vectors, spectra = read(list(layers.values()), self._measures, pictures)
        if pictures:
            bins = [log10_histogram(values, vector[0]) for values, vector in zip(spectra, vectors, strict=True)]
            vectors = [torch.cat(pair) for pair in zip(vectors, bins, strict=True)]
        numbers = torch.stack(vectors).tolist() if vectors else []  # the one transfer of a point
        points: list[Point] = []
        readings, head = dict(zip(layers, numbers, strict=True)), 3 + len(self._measures)
        for tap in self._taps:
            reading = readings.get(tap.name, [])
            points += self._points_of((family, tap.name), step, layers.get(tap.name), reading[:head])
            for logger in trainer.loggers if reading[head:] else ():
                log_histogram(logger, f"{family}/{tap.name}/log10_std", reading[head:], LOG10_EDGES, step)
            if points[-1].flag == Flag.NOT_CALLED:
                self.warn_once(
                    f"layer `{tap.name}` did not run before every point; its curves read NaN there. If it is one that"
                    " never runs choose other `layers`."
                )
        return points

    def _points_of(self, key: tuple[str, str], step: int, layer: LayerRows | None, numbers: list[float]) -> list[Point]:
        finite, seen, top, *values = numbers or [0.0, 0.0, nan, *[nan] * len(self._measures)]
        n, width = int(finite), 0 if layer is None else layer.rows.shape[1]
        flag = flag_of(n, int(seen), top, layer is not None and layer.sketched)
        if flag in (Flag.NOT_CALLED, Flag.FEW_ROWS):
            values = [nan] * len(values)
        points = []
        for measure, value in zip(self._measures, values, strict=True):
            # corrected for the projection, a value is of the whole width, which the null would not be
            corrected = measure.record and layer is not None and layer.sketched
            null = nan if corrected else _null(measure, n, width)
            points.append(Point(*key, measure.curve, step, value, n, null, flag))
        lost = 1 - n / seen if seen else nan
        return [
            *points,
            Point(*key, "n", step, float(n), n, flag=flag),
            Point(*key, "nonfinite_fraction", step, lost, n, flag=flag),
            Point(*key, "flag", step, float(flag), n, flag=flag),
        ]

    def _remember(self, points: Sequence[Point], step: int) -> None:
        """Keep the first measure for the picture, as a share of what noise would read where there is such a null."""
        shown = {point.layer: point for point in points if point.measure == self._measures[0].curve}
        self._history.append(step, {k: p.value / p.null if p.null > 0 else p.value for k, p in shown.items()})

    def _draw(self, trainer: Trainer, step: int) -> None:
        top = 1.0 if self._measures[0].kind == "spectrum" else None
        rows = "".join(f"\n1. `{layer}`" for layer in self._history.layers)
        for logger in trainer.loggers:
            log_image(logger, f"collapse/{self.curves[0]}", heat_map(self._history.values, 0.0, top), step)
            if self._points == 1:
                log_text(logger, "collapse/layers", f"The rows of the picture, from top to bottom:\n{rows}", step)


def _measures(names: Sequence[str] | str) -> list[Measure]:
    if names == "all":
        return [measure for measure in MEASURES.values() if measure.kind != "pairs"]
    if isinstance(names, str) or not names:
        raise ValueError(f"`measures` takes a list of names or 'all', got {names!r}.")
    measures = [get_measure(name) for name in dict.fromkeys(names)]
    for measure in measures:
        if measure.kind == "pairs":
            raise ValueError(f"Measure {measure.name!r} compares two views and cannot watch a layer. Leave it out.")
    return measures


def _null(measure: Measure, n: int, width: int) -> float:
    try:
        return expected_under_isotropy(measure.name, n, width) if n > 1 else nan
    except Exception:  # a measure of the user's own, which has said so already
        return nan
