"""Neural collapse monitor: how far a classifier's features have folded onto their class means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from math import nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.evaluation.evaluation_pass import (
    EvaluationPass,
    Inputs,
    Loader,
    check_forward,
    check_pass,
    is_pass_due,
)
from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.neural_collapse.nc1 import nc1_null
from lightning_collapse.metrics.neural_collapse import measures
from lightning_collapse.monitoring.feature_hooks import Captured
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.monitoring.to_host import to_host
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.execution import Execution
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.modules import Tap, classification_head
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.targets import shifted_labels, targets_of
from lightning_collapse.utilities.trainer import logging_step
from lightning_collapse.utilities.weight_matrices import whole

MAX_DIM = 4096
_PAPER = "Papyan, Han & Donoho 2020, arXiv 2008.08186"
_ZERO = ("0 to infinity", "near 0")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class NeuralCollapseMonitor(Monitor):
    """Log how far the features of a classifier have folded onto the means of their classes.

    In the terminal phase of training for classification this is expected and no failure. **Logged metrics**, to every
    logger and to ``trainer.callback_metrics``, of the inputs of the classifier, ``neural_collapse/{layer}/...``:

    {curves}

    Classes without rows are left out; the minority curves are NaN unless two classes or more have had less than half of
    the rows of the largest, in all points so far.

    A point rests on the training batches right before it: as many as hold ``rows`` rows, if the cadence has them, with
    the features of the training forward, dropout and augmentation included. Statistics are summed in one pass,
    ``O(C d + d^2)`` numbers; ranks sum theirs.

    The papers measure in eval mode on clean data. With a ``loader`` of such data the same is drawn of all of its rows
    at the end of some epochs, as ``neural_collapse/{layer}.eval/...``, and ``nc4`` from a second pass over it,
    which is NaN if the loader can be gone through only once.

    Training does not notice: modes, random states and buffers are as before. Each process goes through what the loader
    gives it, so give it a ``DistributedSampler`` (which repeats some rows if they do not divide evenly); without one
    every process counts all rows. The loader should not share workers or a sampler with state with the training loader.

    Args:
        layer: Name of the classifier; ``None`` is the last Linear layer that the first batch runs. What it receives is
            what is measured.
        labels: A function from the batch to integer labels, as many as the classifier receives rows. ``None`` takes
            the second of a pair, or what a mapping holds under ``label``, ``labels``, ``target``, ``targets`` or ``y``;
            those of causal language models that are their inputs move to the outputs that predict them. The label -100
            is skipped; so are soft labels, with a warning.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows of a point, on each process; ``None`` for two per feature or sixteen per class.
        loader: Batches of clean data, such as a ``DataLoader``, or a function without arguments that returns them
            (for a ``LightningDataModule``), called for every pass; ``None`` for no pass.
        epochs: After how many epochs, the first being 1, to pass over the loader. ``None`` for a logarithmic spacing as
            in the papers: after 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 32 and so on, and after the last.
        inputs: A function ``(pl_module, batch)`` that calls the model. ``None`` calls ``pl_module`` on the first of a
            pair, or with what a mapping holds beside the labels as keywords.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, if there is no
            such classifier, its input has more than 4096 features, or the module has no ``forward`` for the ``loader``.

    Example::

        trainer = Trainer(callbacks=[NeuralCollapseMonitor()])
    """

    family = "neural_collapse"
    declares = (
        Curve("nc1", "within- over between-class scatter", *_ZERO, _PAPER),
        Curve("nc2_equinorm", "norms of the centered class means", *_ZERO, _PAPER),
        Curve("nc2_equiangular", "angles between the centered class means", "0 to 2", "near 0", _PAPER),
        Curve("nc2_etf", "class means against a simplex frame", "0 to 2", "near 0", _PAPER),
        Curve("nc3", "class means against the classifier's rows", "0 to 4", "near 0", _PAPER),
        Curve("cdnv", "variance of classes over their squared distance", *_ZERO, "arXiv 2112.15121"),
        Curve("vci", "scatter of all that is not between classes", "0 to 1", "near 0", "arXiv 2306.03440"),
        Curve(
            "minority_cosine",
            "classifier rows of the rare classes",
            "-1 to 1",
            "near 1",
            "Fang et al. 2021, arXiv 2101.12699",
        ),
        Curve("minority_norm", "lengths of rare over other classifier rows", *_ZERO, "arXiv 2301.00437"),
        Curve("nc4", "classifier against the nearest class mean", "0 to 1", "near 0", _PAPER),
        Curve("classes", "classes that the window held", "0 to the number of classes", "does not tell"),
        Curve("n", "labelled rows", "0 to infinity", "few: do not read the others"),
        Curve("flag", "features and labels", "0 to 7", "above 0: why to doubt the point"),
    )
    identity = ("layer", "every_n_steps")

    def __init__(
        self,
        layer: str | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        every_n_steps: int | None = None,
        rows: int | None = None,
        loader: Loader | None = None,
        epochs: Collection[int] | None = None,
        inputs: Inputs | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        if layer is not None and not isinstance(layer, str):
            raise ValueError(f"`layer` takes one name, or None for the last Linear, got {layer!r}.")
        if labels is not None and not callable(labels):
            raise ValueError(f"`labels` takes a function from a batch to its labels, got {labels!r}.")
        if rows is not None and rows < 2:
            raise ValueError(f"`rows` must be at least 2, or None for the automatic number, got {rows}.")
        check_pass(loader, epochs, inputs)
        self.layer = layer
        self.labels = labels
        self.rows = rows
        self.loader = loader
        self.epochs = epochs
        self.inputs = inputs
        self._tap: Tap | None = None
        self._model: LightningModule | None = None
        self._clean: EvaluationPass | None = None
        self._moments: ClassMoments | None = None
        self._seen: Tensor | None = None
        self._taken = 0
        self._saved: Mapping[str, Any] = {}
        self._latest: list[Tensor] = []
        self._filler: list[Tensor] = []

    @override
    def state(self) -> dict[str, Any]:
        if self._moments is None or world_size() > 1:  # a checkpoint holds what one process has seen
            return {} if self._seen is None else {"seen": self._seen}
        window = {"moments": self._moments.states(), "taken": self._taken}
        return window | {"latest": self._latest, "filler": self._filler, "seen": self._seen}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        assert self._moments is not None  # `start` has made them
        self._saved, device = state, self._moments.count.device
        if (seen := state.get("seen")) is not None and len(seen) == len(self._moments.count):
            self._seen = seen.to(self._moments.count)
        own = {key: x.shape for key, x in self._moments.states().items()}
        if (states := state.get("moments")) and own == {key: x.shape for key, x in states.items()}:
            self._moments = ClassMoments.from_states({key: x.to(device) for key, x in states.items()})
            self._taken = state["taken"]
            self._latest, self._filler = ([x.to(device) for x in state[key]] for key in ("latest", "filler"))

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.loader is not None:
            check_forward(pl_module, self.inputs)
        self._model, self._saved = pl_module, {}
        tap = self._choose(pl_module)
        self._measure_at(tap, pl_module)
        wanted = self._wanted
        self.window = FeatureWindow(
            pl_module,
            [tap],
            pl_module.device,
            wanted * world_size(),
            limit=wanted,
            paired=True,
            take=self._take,
            containment=self.contained,
            choose=partial(self._follow, pl_module, tap) if self.layer is None else None,
        )

    @override
    def stop(self) -> None:
        if self._clean is not None:
            self._clean.remove()
        self._clean = self._tap = self._model = None
        self._latest, self._filler = [], []

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self.window is not None and self.window.wants(batches_left):
            labels = self._labels_of(batch)
            beside = None if labels is None else labels.reshape(-1, 1)
            self.window.before_batch(batch, batches_left, beside)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        super().after_batch(trainer, pl_module, batches_left)
        if self.window is not None and self.window.unpaired is not None:
            self._warn_unpaired(*self.window.unpaired)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        assert self._tap is not None and self._moments is not None and self.window is not None  # noqa: PT018
        if not self.window.taps:  # another classifier was chosen just now
            return {}
        plan = self.window.plans.get(self._tap.name)
        if plan is not None and self._taken < plan.rows and self._filler:  # the point fell on a short batch
            self._moments.update(*self._filler)
        moments = self._moments.reduce() if world_size() > 1 else self._moments
        self._moments, self._taken = self._empty(pl_module), 0
        self._filler, self._latest = self._latest, []
        self._seen = moments.count if self._seen is None else self._seen + moments.count
        return self._readings(self._tap, self._tap.name, moments, self._seen)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        if not numbers:
            return []
        found = {name: number for (_, name), number in numbers.items()}
        [layer] = {layer for layer, _ in numbers}
        n, lost = int(found["n"]), found.pop("nonfinite")
        flag = Flag.NONFINITE if lost else Flag.OK
        if not n:
            flag = Flag.FEW_ROWS if lost else Flag.NOT_CALLED
            self.warn_of_layer(layer, f"`{layer}` received no labelled rows before a point; its curves read NaN there.")
            found = {name: value if name in ("n", "classes") else nan for name, value in found.items()}
        found["flag"] = float(flag)
        nulls = {"nc1": nc1_null(n, int(found["classes"]), self._shape[1])}
        return [
            Point(self.family, layer, curve.name, step, found[curve.name], n, nulls.get(curve.name, nan), flag)
            for curve in self.declares
            if curve.name in found
        ]

    @override
    def warn_of_no_point(self, trainer: Trainer) -> None:
        if self.loader is None:
            super().warn_of_no_point(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._clean is None or not is_pass_due(trainer, self.epochs):
            return
        with self.contained("the pass over `loader`", "its point is left out"):
            found = self._clean.run(trainer, pl_module, self._empty(pl_module))
            if found is None:
                return
            tap = self._clean.tap
            readings = self._readings(tap, f"{tap.name}.eval", found.moments, None)
            same, compared = found.agreement
            readings[f"{tap.name}.eval", "nc4"] = torch.where(compared > 0, 1 - same / compared, nan)
            step = max(logging_step(trainer) - 1, 0)  # that of the epoch's last batch
            points = self.points(step, to_host(readings))
            if any(point.measure == "nc4" and point.n and point.value != point.value for point in points):
                self.warn_once(
                    "`loader` could not be gone through twice; NC4 reads NaN. Pass a function that makes it."
                )
            self.publish(trainer, pl_module, points)

    def _take(self, captured: Captured, labels: Tensor | None, batches_left: int) -> None:
        """Add the rows of a batch, or keep them for a point that falls on a short one."""
        assert self._tap is not None and self._moments is not None and self.window is not None  # noqa: PT018
        if labels is None:
            return
        batch = [captured.rows, torch.where(captured.mask, labels[:, 0].long(), -100)]
        if batches_left >= self.window.plans[self._tap.name].batches:
            self._filler = batch
            return
        self._moments.update(*batch)
        self._taken, self._latest = self._taken + len(captured.rows), batch

    def _readings(self, tap: Tap, layer: str, moments: ClassMoments, seen: Tensor | None) -> dict[Name, Tensor]:
        """What statistics that all processes share come to."""
        classifier: Any = tap.module
        weight = whole(classifier.weight)
        found = measures(moments, weight.to(moments.shift), seen=seen)
        drawn = {curve.name for curve in self.declares} - {"nc4", "flag"}
        readings = {(layer, name): value for name, value in found.items() if name in drawn}
        return readings | {(layer, "nonfinite"): moments.nonfinite}

    def _choose(self, pl_module: LightningModule) -> Tap:
        return self._checked(self.choose_tap("layer", self.layer, pl_module, ":input"))

    def _follow(self, pl_module: LightningModule, tap: Tap, order: Execution) -> list[Tap]:
        """The last Linear that the first batch has run, if it can be read."""
        head = classification_head(pl_module, order)
        if head is None or head == tap or self.window is None:
            return [tap]
        try:
            self._measure_at(self._checked(head), pl_module)
        except MisconfigurationException:
            return [tap]
        self.restore(self._saved)  # of a fit that had ended, which says nothing of the order
        self.window.rows, self.window.limit = self._wanted * world_size(), self._wanted
        return [head]

    def _measure_at(self, tap: Tap, pl_module: LightningModule) -> None:
        self._tap = tap
        self._moments = self._empty(pl_module)
        self._seen = torch.zeros_like(self._moments.count)
        self._taken, self._latest, self._filler = 0, [], []
        if self._clean is not None:
            self._clean.remove()
        if self.loader is not None:
            self._clean = EvaluationPass(
                tap, self.loader, self.inputs, self._labels_of, self._labels_captured, self.warn_once
            )

    def _checked(self, tap: Tap) -> Tap:
        call = f"`NeuralCollapseMonitor(layer={self.layer!r})`"
        weight = getattr(tap.module, "weight", None)
        if not isinstance(weight, Tensor) or torch.nn.parameter.is_lazy(weight) or weight.ndim != 2 or len(weight) < 2:
            raise MisconfigurationException(
                f"{call}: a classifier has a weight of shape (C, d) with at least two classes, and `{tap.name}` has"
                " none. Name the layer that returns the logits."
            )
        if weight.shape[1] > MAX_DIM:
            raise MisconfigurationException(
                f"{call}: the scatter of {weight.shape[1]} features would take {weight.shape[1] ** 2 * 8 / 2**30:.1f}"
                f" GiB; up to {MAX_DIM} are watched. Feed `NeuralCollapse` with projected features instead."
            )
        return tap

    def _empty(self, pl_module: LightningModule) -> ClassMoments:
        return ClassMoments(*self._shape, device=pl_module.device)

    @property
    def _shape(self) -> tuple[int, int]:
        """Classes and features of the classifier."""
        assert self._tap is not None
        classifier: Any = self._tap.module
        classes, dim = classifier.weight.shape
        return classes, dim

    @property
    def _wanted(self) -> int:
        classes, dim = self._shape
        return self.rows or max(2 * dim, 16 * classes)

    def _labels_of(self, batch: Any) -> Tensor | None:
        try:
            labels = self._default_labels(batch) if self.labels is None else self.labels(batch)
        except Exception as error:  # of the user's function: what is only watched goes on
            self.warn_once(f"`labels` failed: {type(error).__name__}: {error}")
            return None
        if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
            self.warn_once(
                "the batch has no integer labels; batches like it are left out. Pass `labels=`, a function from the"
                " batch to its labels, such as `labels=lambda batch: batch['class']`."
            )
            return None
        return labels

    def _default_labels(self, batch: Any) -> Tensor | None:
        labels = targets_of(batch)
        if not isinstance(labels, Tensor) or self._model is None:
            return labels
        return shifted_labels(batch, labels, self._model)

    def _labels_captured(self, captured: Captured, labels: Tensor) -> Tensor | None:
        """The label of every row that was captured; -100 for padding."""
        if captured.returned != labels.numel():
            self._warn_unpaired(captured.returned, labels.numel())
            return None
        labels = evenly(labels.flatten().to(captured.rows.device).long(), len(captured.rows))
        return torch.where(captured.mask, labels, -100)

    def _warn_unpaired(self, rows: int, labels: int) -> None:
        self.warn_once(
            f"the classifier received {rows} rows and the batch has {labels} labels; such batches are left out. Say"
            " which labels belong to its rows with `labels=`."
        )
