"""Collapse monitor: ranks and spreads of the features of layers while the model trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.loss_reader import LossReader, reader_of
from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.assignment import assignment_null
from lightning_collapse.monitoring.codebooks import Codebooks, code_points
from lightning_collapse.monitoring.evaluate import assignments, evaluate
from lightning_collapse.monitoring.feature_buffer import Batch, FeatureBuffer, LayerFeatures
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.monitoring.layer_points import JUDGED, layer_points
from lightning_collapse.monitoring.to_host import to_host
from lightning_collapse.monitoring.view_points import VIEW_CURVES, VIEWS, lidar_points, view_points
from lightning_collapse.reporting import (
    LOG10_EDGES,
    History,
    labelled_heat_map,
    log10_histogram,
    log_histogram,
    log_image,
)
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.channel_axis import ends_in_maps
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.modules import curve_name, default_taps
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import MEASURES, Curve, Measure, get_measure
from lightning_collapse.utilities.trainer import logging_step

PICTURE_EVERY = 10
_HISTOGRAM = "log10_std"
_ASSIGNED = "assignment_perplexity"
_NONFINITE = "nonfinite_fraction"
_LIDAR = "lidar"
_CODES = "codes"


class CollapseMonitor(Monitor):
    """Log how many directions the outputs of chosen layers use, and how far they spread.

    **Logged metrics**, one curve per layer, to every logger and to ``trainer.callback_metrics``:

    - ``collapse/{layer}/{measure}`` for every measure;
    {curves}
    - ``val/collapse/...``: the same of the validation batches, with ``validation=True``.

    The curve ``assignment_perplexity`` is of layers whose outputs go through a softmax that the loss compares with no
    target, such as prototypes and the scores of a router, and of codebooks, beside ``unused_codes``: of tables in which
    the model looks up what it has searched for itself, see :class:`~lightning_collapse.monitoring.Codebooks`.

    The curves ``views/...`` are of layers that see two views of the same samples, in two calls of a training step or
    one behind the other in a batch: those in which one view finds the other far above chance at the first points.
    ``lidar`` is drawn of those with more samples in the window than features; read it at one number of samples, beside
    its null, :func:`~lightning_collapse.functional.lidar_null`, which isotropic features read, and beside the recall:
    views that have nothing in common read full.

    Besides, to loggers that can show them, every tenth point: a histogram of log10 standard deviations along the
    principal axes per layer, and a picture of the first measure over layers and steps; that from the hundredth point on
    at every hundredth.

    A point rests on a window of the training batches just before it, across the end of an epoch: as many as four rows
    per feature need, as long as that costs no more than ``max_overhead`` of the training. Never compare ranks at
    different ``n``. Vectors ``(N, D)`` count as they are, tokens
    ``(N, L, D)`` each by itself (those with a zero in ``batch["attention_mask"]`` not at all), maps ``(N, C, H, W)``
    by their spatial mean; of models that end in maps themselves, such as those of segmentation, by their positions.

    Args:
        layers: Names of submodules, or glob patterns of them; ``"name:input"`` is what a module receives instead of
            what it returns. ``None`` takes up to a dozen by the rule of ``default_taps``.
        measures: Names of registered measures (``python -m lightning_collapse measures`` lists them), or ``"all"``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows per layer and point, over all processes, instead of the automatic number.
        max_overhead: Share of the floating-point operations of training that the points may cost, which bounds the
            automatic number of rows (from below by 64).
        max_dim: A layer with more features is watched through a random projection to this many.
        validation: Also make a point of every validation epoch during the fit.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an unknown measure or an argument out of range; when the fit starts, as
            ``MisconfigurationException``, on a pattern that matches nothing.

    Example::

        trainer = Trainer(callbacks=[CollapseMonitor()])
    """

    family = "collapse"
    declares = (
        Curve("n", "rows behind the point, over all processes", "0 to infinity", "few: do not read the ranks"),
        Curve(_NONFINITE, "rows left out for NaN or infinity; drawn if any", "0 to 1", "above 0"),
        Curve("flag", "why to doubt the point, see :class:`~lightning_collapse.utilities.Flag`", "0 to 7", "above 0"),
        Curve("assignment_perplexity", "outputs of a softmax, or codes, in use, see the measure", "1 to D", "near 1"),
        Curve("unused_codes", "codes of a codebook that no row chose", "0 to 1", "near 1"),
        *VIEW_CURVES,
    )
    identity = ("layers", "measures", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        measures: Sequence[str] | Literal["all"] = JUDGED,
        every_n_steps: int | None = None,
        rows: int | None = None,
        max_overhead: float = 0.005,
        max_dim: int = 2048,
        validation: bool = False,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
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
        self._layers: dict[str, LayerFeatures] = {}
        self._histograms: dict[str, list[float]] = {}
        self._history = History()
        self._told = False
        self._validation_rows = FeatureBuffer(max_dim)
        self._reader: LossReader | None = None
        self._heads: frozenset[str] = frozenset()

    @property
    def _measures(self) -> list[Measure]:
        # looked up and not kept: a callback travels to spawned processes, and a measure may be a lambda's
        return [get_measure(name) for name in self._names]

    @property
    @override
    def curves(self) -> list[str]:
        """Names of the measures it draws, and of what goes with them."""
        own = (curve.name for curve in self.declares if not curve.family)
        return [*(measure.curve for measure in self._measures), *own]

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        taps = self.choose_taps(self.layers, default_taps(pl_module), pl_module)
        self._history, self._heads, self._told = History(), frozenset(), False
        self._reader = reader_of(pl_module, self.contained)
        self.window = FeatureWindow(
            pl_module,
            taps,
            pl_module.device,
            self.rows,
            self.max_overhead,
            self.max_dim,
            limit=self.rows,
            containment=self.contained,
            choose=partial(default_taps, pl_module) if self.layers is None else None,
            views=True,
            positions=ends_in_maps(pl_module),
            codebooks=Codebooks(pl_module, None if self.layers is None else [t.name for t in taps], self.contained),
        )

    @override
    def stop(self) -> None:
        if self._reader is not None:
            self._reader.remove()
            self._reader = None
        self._layers = {}
        self._validation_rows.clear()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        super().before_batch(trainer, batch, batches_left)
        if self._reader is not None:
            self._reader.before_batch(batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._reader is not None:
            self._reader.before_backward(loss)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        super().after_batch(trainer, pl_module, batches_left)
        if self._reader is not None:
            self._reader.after_batch()
            if not self._reader.waits:
                use, self._reader = self._reader.use, None
                self._heads = frozenset(map(curve_name, use.heads if use is not None else ()))

    @override
    def state(self) -> dict[str, Any]:
        return {"history": self._history.state_dict()}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._history.load_state_dict(state["history"])

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        if not self._points and self.window is not None and (functional := self.window.functional):
            some = ", ".join(f"`{name}`" for name in functional[:3])
            self.warn_once(
                f"{len(functional)} layer(s) are never called, and their weights are trained ({some}): a function is"
                " given them. What they compute is read only where a module around them returns it."
            )
        pictures = bool(trainer.loggers) and self._points % PICTURE_EVERY == 0
        if self.window is None:
            return {}
        views = {(name, VIEWS): sums for name, sums in self.window.views().items()}
        views |= {(name, _LIDAR): torch.stack(found) for name, found in self.window.lidar().items()}
        codes = {(name, _CODES): found for name, found in self.window.codes().items()}
        return self._evaluate(self.window.features(), pictures) | views | codes

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points = self._make_points(self.family, step, numbers)
        if self.window is not None and self.window.pairs is not None:
            points += view_points(self.window.pairs, step, _of(numbers, VIEWS))
            widths = {name: plan.width for name, plan in self.window.plans.items()}
            points += lidar_points(step, _of(numbers, _LIDAR), widths)
        if self.window is not None and self.window.codebooks is not None:
            points += code_points(step, _of(numbers, _CODES), self.window.codebooks.sizes)
        first = self._measures[0].curve  # for the picture, as a share of what noise reads where there is such a null
        shown = {point.layer: point for point in points if point.measure == first}
        self._history.append(step, {name: p.value / p.null if p.null > 0 else p.value for name, p in shown.items()})
        self._histograms = {layer: number for (layer, name), number in numbers.items() if name == _HISTOGRAM}
        if not self._told and self.window is not None and self.window.settled:
            self._say_what_is_drawn(points)
        return points

    @override
    def draw(self, trainer: Trainer, step: int) -> None:
        for logger in trainer.loggers:
            for layer, counts in self._histograms.items():
                log_histogram(logger, f"collapse/{layer}/{_HISTOGRAM}", counts, LOG10_EDGES, step)
        # the picture is of the whole run: late in a long one it changes slowly
        if self._points % (PICTURE_EVERY if self._points < 10 * PICTURE_EVERY else 10 * PICTURE_EVERY) == 0:
            self._draw_history(trainer, step)

    @override
    def hears_validation(self) -> bool:
        return self.validation

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.validation and self.window is not None and not trainer.sanity_checking:
            self.window.listen(batch, planned=False)

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
        if self.window is None or not self.window.hooks.armed:
            return
        batches = sum(trainer.num_val_batches)
        for name, captured in self.window.pop().items():
            if (plan := self.window.plans.get(name)) is not None and len(self._validation_rows) < plan.rows:
                share = plan.rows_per_batch if batches == float("inf") else -(-plan.rows // max(int(batches), 1))
                batch = Batch(0, captured.rows, captured.mask, None).spread(share)
                self._validation_rows.add(name, batch, plan.rows)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if not self.validation or self.window is None or trainer.sanity_checking:
            return
        with self.contained("reading validation batches", "the point is left out"):
            layers = {}
            for name, plan in self.window.plans.items():
                width = min(plan.width, self.max_dim)
                layers[name] = self._validation_rows.read(name, width, plan.rows, 0, pl_module.device)
                layers[name].expected, layers[name].width = plan.rows * world_size(), plan.width
            self._validation_rows.clear()
            numbers = to_host(self._evaluate(layers, pictures=False))
            self.publish(trainer, pl_module, self._make_points("val/collapse", logging_step(trainer), numbers))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._points:
            with self.contained("drawing", "the picture is left out"):
                self._draw_history(trainer, logging_step(trainer))

    def _evaluate(self, layers: Mapping[str, LayerFeatures], pictures: bool) -> dict[Name, Tensor]:
        # every process must bring every layer, if only its width
        self._layers = {name: layer for name, layer in layers.items() if len(layer.rows) or world_size() > 1}
        readings: dict[Name, Tensor] = {}
        heads = {name: layer for name, layer in self._layers.items() if name in self._heads and not layer.sketched}
        readings |= {(name, _ASSIGNED): reading for name, reading in assignments(heads).items()}
        for name, found in evaluate(self._layers, self._measures, pictures).items():
            readings |= {(name, key): value for key, value in found.readings().items()}
            if pictures:
                readings[name, _HISTOGRAM] = log10_histogram(found.singular_values, found.n)
        return readings

    def _make_points(self, family: str, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points: list[Point] = []
        for tap in self.window.taps if self.window is not None else ():
            layer = self._layers.get(tap.name)
            of_layer = {key: number for (name, key), number in numbers.items() if name == tap.name}
            found = layer_points(family, tap.name, step, layer, self._measures, of_layer)
            points += found
            if found[0].flag == Flag.NOT_CALLED:
                self.warn_of_layer(tap.name)
            if (assigned := of_layer.get(_ASSIGNED)) is not None and layer is not None:
                n, flag = found[0].n, found[0].flag
                expected = assignment_null(n, layer.width)
                points.append(Point(family, tap.name, _ASSIGNED, step, float(assigned), n, expected, flag))
        return points

    def _say_what_is_drawn(self, points: Sequence[Point]) -> None:
        """At the first point of all layers: only then it is known which of them run, and which see two views."""
        self._told = True
        drawn = Counter(point.layer for point in self.in_detail(points) if point.drawn)
        if self.window is not None and self.window.pairs is not None:  # from the next point on
            has = {point.layer for point in points if point.measure == _LIDAR}
            drawn.update((self.window.pairs.layers & self.window.lidar_widths().keys()) - has)
        twice = ", and as many of validation" if self.validation else ""
        curves = f": {drawn.total()} curves, at most {max(drawn.values())} of a layer{twice}" if drawn else ""
        names = ", ".join(drawn) or "nothing: no linear layer, convolution or normalization runs"
        hint = " Choose others with `layers=[...]`." if self.layers is None else ""
        rank_zero_info(f"`CollapseMonitor` watches {names}{curves}.{hint}")

    def _draw_history(self, trainer: Trainer, step: int) -> None:
        history, name = self._history, self.curves[0]
        share = self._measures[0].kind == "spectrum"
        title = f"{name}, as a share of what isotropic noise reads" if share else name
        top = 1.0 if share else None
        for logger in trainer.loggers if history.steps and history.layers else ():
            picture = labelled_heat_map(history.values, history.layers, history.steps, title, low=0.0, high=top)
            log_image(logger, f"collapse/{name}", picture, step)


def _of(numbers: Mapping[Name, Any], name: str) -> dict[str, list[float]]:
    """Readings of one name, by layer."""
    return {layer: reading for (layer, key), reading in numbers.items() if key == name}


def _measures(names: Sequence[str] | str) -> list[Measure]:
    if names == "all":
        return [measure for measure in MEASURES.values() if measure.kind in ("spectrum", "rows")]
    if isinstance(names, str) or not names:
        raise ValueError(f"`measures` takes a list of names or 'all', got {names!r}.")
    measures = [get_measure(name) for name in dict.fromkeys(names)]
    for measure in measures:
        if measure.kind == "pairs":
            raise ValueError(f"Measure {measure.name!r} compares two views and cannot watch a layer. Leave it out.")
        if measure.kind == "weights":
            raise ValueError(
                f"Measure {measure.name!r} reads weights, no features. Draw it with"
                f" `WeightSpectrumMonitor(measures=[{measure.name!r}])`."
            )
    return measures
