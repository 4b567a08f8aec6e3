"""Geometry of labels: how far the features of any layers are sorted by any labels, of the task or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import nan
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.neural_collapse.nulls import collapse_nulls
from lightning_collapse.monitoring.batch_labels import BatchLabels
from lightning_collapse.monitoring.class_readings import label_readings
from lightning_collapse.monitoring.class_window import ClassWindow
from lightning_collapse.monitoring.feature_hooks import Captured
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.spectral.seen_classes import SeenClassMoments
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.execution import Execution
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.modules import Tap, classifier_head
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve

Labels = Callable[[Any], Tensor]
ROOM, LEAST = 1024, 1024
MAX_DIM = 2048
_PAPER = "Papyan, Han & Donoho 2020, arXiv 2008.08186"
_ZERO = ("0 to infinity", "near 0")


class LabelledGeometryMonitor(Monitor):
    """Log how far the features of any layers are sorted by labels: superclasses, domains, slides, speakers.

    Nothing of it needs a classifier, or labels that the network is trained on: that a layer is sorted by the hospital
    an image came from is a reading as good as that it is sorted by the diagnosis. **Logged metrics**, for each layer
    and set of labels, ``labelled_geometry/{layer}.{set}/...``, or ``labelled_geometry/{layer}/...`` of a single set
    without a name:

    {curves}

    How many classes there are is found as they come, up to half the rows of a point and 1024; rows of more are left
    out and flagged, and classes of a single row are. Points know what features without class structure would read, the
    same for any labels: compare with that, and sets of labels with each other at one number of rows. They rest on the
    training batches right before them, with the features of the training forward; sums over processes are exact.
    Layers of more than 2048 features are left out with a warning.

    Args:
        layers: Names of submodules, or glob patterns of them, whose output is read; ``name:input`` for what a layer
            receives. ``None`` for what the last Linear that the first batch runs receives, or fixed prototypes behind
            it. Each costs a Cholesky factor of its width a point, and more where features are not of full rank.
        labels: A function from the batch to integers, or several by the name of their set: one for every row that a
            layer returns, or for every sample, whose tokens share it. Negative numbers are skipped. ``None`` takes the
            batch's own labels, where they usually are.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows of a point, on each process; ``None`` for four per feature, but 1024 at least.
        detail: ``"low"`` keeps ``n`` and ``flag`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument of the wrong kind; when the fit starts, as ``MisconfigurationException``, if a
            pattern matches nothing.

    Example::

        domains = {"class": lambda batch: batch["y"], "hospital": lambda batch: batch["site"]}
        trainer = Trainer(callbacks=[LabelledGeometryMonitor(["body"], labels=domains)])
    """

    family = "labelled_geometry"
    declares = (
        Curve("nc1", "within- over between-class scatter", *_ZERO, _PAPER),
        Curve("cdnv", "variance of classes over their squared distance", *_ZERO, "arXiv 2112.15121"),
        Curve("log_cdnv", "the same, mean of the logarithms over pairs", "any number", "falls", "arXiv 2112.15121"),
        Curve("vci", "scatter of all that is not between classes", "0 to 1", "near 0", "arXiv 2306.03440"),
        Curve("log_fisher_ratio", "between- over within-class scatter, whitened", "any number", "rises", "Fisher 1936"),
        Curve("gnc2", "distances between directions of class means", *_ZERO, "arXiv 2405.17767"),
        Curve("between_share", "variance between classes over all variance", "0 to 1", "near 1"),
        Curve("classes", "classes that the window held", "0 to 1024", "does not tell"),
        Curve("n", "labelled rows", "0 to infinity", "few: do not read the others"),
        Curve("flag", "features and labels", "0 to 8", "above 0: why to doubt the point"),
    )
    identity = ("layers", "sets", "every_n_steps")
    find_head = staticmethod(classifier_head)

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        labels: Labels | Mapping[str, Labels] | None = None,
        every_n_steps: int | None = None,
        rows: int | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "what the last Linear receives")
        functions = labels if isinstance(labels, Mapping) else {"": labels}
        named = isinstance(labels, Mapping) and all(isinstance(name, str) and name for name in functions)
        if not (labels is None or callable(labels) or (named and functions and all(map(callable, functions.values())))):
            raise ValueError(
                "`labels` takes a function from a batch to integers, or a mapping from names to such functions, got"
                f" {labels!r}."
            )
        if rows is not None and (not isinstance(rows, int) or rows < 2):
            raise ValueError(f"`rows` must be at least 2, or None for the automatic number, got {rows!r}.")
        self.layers, self.labels, self.rows = layers, functions, rows
        self.sets = list(functions)
        self._find: dict[str, BatchLabels] = {}
        self._of_batch: dict[str, Tensor] = {}
        self._rows: dict[str, dict[str, ClassWindow]] = {}
        self._device = torch.device("cpu")

    @override
    def state(self) -> dict[str, Any]:
        if world_size() > 1:  # a checkpoint holds what one process has seen
            return {}
        return {name: [rows.state_dict() for rows in sets.values()] for name, sets in self._rows.items()}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        assert self.window is not None
        for name, sets in state.items():
            if name not in self.window.plans:  # as where the default layers are others now
                continue
            for rows, saved in zip(self._windows(name).values(), sets, strict=False):
                rows.load_state_dict(saved)

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find = {name: BatchLabels(f, pl_module, self.warn_once, name) for name, f in self.labels.items()}
        self._rows, self._device = {}, pl_module.device
        if self.layers is None:
            taps = [self.choose_tap("layers", None, pl_module)]
        else:
            taps = self.choose_taps(self.layers, [], pl_module)
        self.window = FeatureWindow(
            pl_module,
            taps,
            pl_module.device,
            lambda width: (self.rows or max(4 * width, LEAST)) * world_size(),
            limit=self.rows or 4 * MAX_DIM,
            take=self._take,
            containment=self.contained,
            choose=partial(self._follow, pl_module, taps) if self.layers is None else None,
        )

    @override
    def stop(self) -> None:
        self._find, self._of_batch, self._rows = {}, {}, {}

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self.window is not None and self.window.wants(batches_left):
            # now, since a step may change its batch in place
            found = {name: find(batch) for name, find in self._find.items()}
            self._of_batch = {name: labels.clone() for name, labels in found.items() if labels is not None}
        super().before_batch(trainer, batch, batches_left)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        readings: dict[Name, Tensor] = {}
        taps, plans = ((), {}) if self.window is None else (self.window.taps, self.window.plans)
        for tap in taps:
            if tap.name not in plans:
                self.warn_of_layer(tap.name)
        for name, plan in plans.items():
            for labels, rows in self._windows(name).items():
                found = label_readings(rows.pop(plan.rows))
                readings |= {(_curve(name, labels), measure): value for measure, value in found.items()}
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        if self.window is None:
            return []
        widths = {_curve(name, labels): plan.width for name, plan in self.window.plans.items() for labels in self.sets}
        points = []
        for layer, width in widths.items():
            found = {measure: value for (of, measure), value in numbers.items() if of == layer}
            if found:
                points += self._points_of(step, layer, width, found)
        return points

    def _follow(self, pl_module: LightningModule, taps: list[Tap], order: Execution) -> list[Tap]:
        """The last Linear that the first batch has run."""
        head = self.find_head(pl_module, order)
        return taps if head is None else [head]

    def _points_of(self, step: int, layer: str, width: int, found: dict[str, Any]) -> list[Point]:
        n, classes = int(found["n"]), int(found["classes"])
        flag = Flag.NONFINITE if found["nonfinite"] else Flag.LEFT_OUT if found["crowded"] else Flag.OK
        if not n:
            flag = Flag.FEW_ROWS if found["labelled"] else Flag.NOT_CALLED
            missing = "no two rows of one label" if found["labelled"] else "no labelled rows"
            self.warn_of_layer(layer, f"{{}} had {missing} before a point; the curves read NaN there.")
        if n <= width + 1:
            found["vci"] = nan  # 0 of any rows, as if they had collapsed
        if n <= width + classes + 1:
            found["log_fisher_ratio"] = nan  # likewise
        found["flag"] = float(flag)
        nulls = collapse_nulls(n, classes, width)
        return [
            Point(self.family, layer, key, step, found[key], n, nulls.get(key, nan), flag)
            for key in (curve.name for curve in self.declares)
        ]

    def _windows(self, name: str) -> dict[str, ClassWindow]:
        """The rows of a layer by set of labels."""
        assert self.window is not None
        width = self.window.plans[name].width
        if width > MAX_DIM:
            self.warn_once(f"`{name}` has {width} features, of more than {MAX_DIM}; it is left out.")
            return {}
        if name not in self._rows:
            room = min(ROOM, max((self.rows or max(4 * width, LEAST)) // 2, 2))  # of two rows each at least
            make = partial(SeenClassMoments, room, width, device=self._device)
            self._rows[name] = {labels: ClassWindow(make) for labels in self.sets}
        return self._rows[name]

    def _take(self, name: str, captured: Captured, beside: Tensor | None, batches_left: int) -> None:
        """Add the rows of a batch, as many as are planned."""
        assert self.window is not None
        plan = self.window.plans[name]
        if captured.rows.shape[1] != plan.width:  # another thing than it returned before
            return
        picked = evenly(torch.arange(len(captured.rows), device=captured.rows.device), plan.rows)
        for labels, rows in self._windows(name).items():
            found = self._matching(name, captured, self._of_batch.get(labels))
            if found is not None:
                rows.add(captured.rows[picked], found[picked], early=batches_left >= plan.batches)

    def _matching(self, name: str, captured: Captured, labels: Tensor | None) -> Tensor | None:
        """The label of every row that was captured; tokens have that of their sample, and every call has all."""
        if labels is None or not (captured.returned or labels.numel()):  # an empty batch, on which nothing is to say
            return None
        returned, rest = divmod(captured.returned, len(captured.calls))
        if rest or not labels.numel() or returned % labels.numel():
            self.warn_of_layer(
                name,
                f"{{}} returned rows that the labels do not fit, {captured.returned} for {labels.numel()}; such batches"
                " are left out."
                " Pass `labels=` a function that returns one for every row, or for every sample.",
            )
            return None
        labels = labels.flatten().to(captured.rows.device).long().repeat_interleave(returned // labels.numel())
        labels = torch.cat([evenly(labels, size) for size in captured.calls])
        return torch.where(captured.mask, labels, -100)


def _curve(layer: str, labels: str) -> str:
    return f"{layer}.{labels}" if labels else layer
