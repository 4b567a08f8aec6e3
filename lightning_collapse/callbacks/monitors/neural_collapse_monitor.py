"""Curves of neural collapse: how far a classifier's features have folded onto their class means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.evaluation.evaluation_pass import (
    CleanPass,
    Inputs,
    Loader,
    check_forward,
    check_pass,
    is_pass_due,
)
from lightning_collapse.callbacks.monitors.monitor import Monitor
from lightning_collapse.functional.neural_collapse.nc1 import nc1_null
from lightning_collapse.metrics.neural_collapse import measures
from lightning_collapse.monitoring.feature_hooks import Captured, FeatureHooks
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.features import evenly, padding_mask
from lightning_collapse.utilities.modules import Tap, default_taps, find_taps, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.targets import targets_of
from lightning_collapse.utilities.trainer import logging_step
from lightning_collapse.utilities.weight_matrices import whole

FAMILY = "neural_collapse"
MAX_DIM = 4096
_PAPER = "Papyan, Han & Donoho 2020, arXiv 2008.08186"
_CURVES = {
    "nc1": ("within- over between-class scatter", "0 to infinity", "near 0", _PAPER),
    "nc2_equinorm": ("norms of the centered class means", "0 to infinity", "near 0", _PAPER),
    "nc2_equiangular": ("angles between the centered class means", "0 to 2", "near 0", _PAPER),
    "nc2_etf": ("class means against a simplex frame", "0 to 2", "near 0", _PAPER),
    "nc3": ("class means against the classifier's rows", "0 to 4", "near 0", _PAPER),
    "cdnv": ("variance of classes over their squared distance", "0 to infinity", "near 0", "arXiv 2112.15121"),
    "vci": ("scatter of all that is not between classes", "0 to 1", "near 0", "arXiv 2306.03440"),
    "minority_cosine": (
        "classifier rows of the rare classes",
        "-1 to 1",
        "near 1",
        "Fang et al. 2021, arXiv 2101.12699",
    ),
    "minority_norm": ("lengths of rare over other classifier rows", "0 to infinity", "near 0", "arXiv 2301.00437"),
    "nc4": ("classifier against the nearest class mean", "0 to 1", "near 0", _PAPER),
    "classes": ("classes that the window held", "0 to the number of classes", "does not tell", ""),
    "n": ("labelled rows", "0 to infinity", "few: do not read the others", ""),
    "flag": ("features and labels", "0 to 7", "above 0: why to doubt the point", ""),
}
for _name, (_reads, _range, _collapsed, _source) in _CURVES.items():
    register_curve(FAMILY, _name, reads=_reads, range=_range, collapsed=_collapsed, source=_source)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_VALUES = [name for name in _CURVES if name not in ("nc4", "classes", "n", "flag")]


class NeuralCollapseMonitor(Monitor):
    """Log how far the features of a classifier have folded onto the means of their classes.

    In the terminal phase of training for classification this is expected and no failure. **Logged metrics**, to every
    logger and to ``trainer.callback_metrics``, of the inputs of the classifier, ``neural_collapse/{layer}/...``:

    - ``nc1``: variability, :func:`~lightning_collapse.functional.nc1`;
    - ``nc2_equinorm``, ``nc2_equiangular``, ``nc2_etf``: the class means become a simplex frame;
    - ``nc3``: they align with the rows of the classifier's weight;
    - ``cdnv``, ``vci``: class-distance normalized variance, variability collapse index;
    - ``minority_cosine``, ``minority_norm``: directions and lengths of the classifier's rows of rare classes, see
      :func:`~lightning_collapse.functional.minority_cosine`; NaN unless two classes or more have had less than half of
      the rows of the largest, in all points so far;
    - ``classes``, ``n``: classes and labelled rows behind the point; classes without rows are left out;
    - ``flag``: 0, or why to doubt the point, see :class:`~lightning_collapse.utilities.Flag`.

    A point rests on the training batches right before it: as many as hold ``rows`` rows, if the cadence has them, with
    the features of the training forward, dropout and augmentation included. Statistics are summed in one pass,
    ``O(C d + d^2)`` numbers; ranks sum theirs.

    The papers measure in eval mode on clean data. With a ``loader`` of such data the same is drawn of all of its rows
    at the end of some epochs, as ``neural_collapse/{layer}.eval/...``, and from a second pass over it

    - ``nc4``: how often the classifier does not choose the class whose mean is nearest,
      :func:`~lightning_collapse.functional.nc4`; NaN if the loader can be gone through only once.

    Training does not notice: modes, random states and buffers are as before. Each process goes through what the loader
    gives it, so give it a ``DistributedSampler`` (which repeats some rows if they do not divide evenly); without one
    every process counts all rows. The loader should not share workers or a sampler with state with the training loader.

    Args:
        layer: Name of the classifier; ``None`` is the last Linear layer. What it receives is what is measured.
        labels: A function from the batch to integer labels, as many as the classifier receives rows. ``None`` takes
            the second of a pair, or what a mapping holds under ``label``, ``labels``, ``target``, ``targets`` or ``y``.
            The label -100 is skipped; so are soft labels, with a warning.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows of a point, on each process; ``None`` for two per feature or sixteen per class.
        loader: Batches of clean data, such as a ``DataLoader``, or a function without arguments that returns them
            (for a ``LightningDataModule``), called for every pass; ``None`` for no pass.
        epochs: After how many epochs, the first being 1, to pass over the loader. ``None`` for a logarithmic spacing as
            in the papers: after 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 32 and so on, and after the last.
        inputs: A function ``(pl_module, batch)`` that calls the model. ``None`` calls ``pl_module`` on the first of a
            pair, or with what a mapping holds beside the labels as keywords.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, if there is no
            such classifier, its input has more than 4096 features, or the module has no ``forward`` for the ``loader``.

    Example::

        trainer = Trainer(callbacks=[NeuralCollapseMonitor()])
    """

    family = FAMILY

    def __init__(
        self,
        layer: str | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        every_n_steps: int | None = None,
        rows: int | None = None,
        loader: Loader | None = None,
        epochs: Collection[int] | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        super().__init__(every_n_steps)
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
        self._taps: FeatureHooks | None = None
        self._moments: ClassMoments | None = None
        self._clean: CleanPass | None = None
        self._labels: Tensor | None = None
        self._batches: int | None = None  # not known before the first one that was heard
        self._first = True
        self._seen: Tensor | None = None
        self._restored: dict[str, Any] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layer=self.layer, every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        moments = {} if self._moments is None or world_size() > 1 else self._moments.states()
        return {"batches": self._batches, "moments": moments} | ({} if self._seen is None else {"seen": self._seen})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tap = self._choose(pl_module)
        let_hooks_be_seen(pl_module)
        self._moments = self._empty(pl_module)
        self._taps = FeatureHooks([self._tap], self._wanted)
        if self.loader is not None:
            check_forward(pl_module, self.inputs)
            self._clean = CleanPass(
                self._tap, self.loader, self.inputs, self._labels_of, self._labels_heard, self.warn_once
            )
        self._batches = self._restored.get("batches")
        self._first = self._batches is None
        if states := self._restored.get("moments"):
            self._moments = ClassMoments.from_states({key: x.to(pl_module.device) for key, x in states.items()})
        seen = self._restored.get("seen")
        self._seen = torch.zeros_like(self._moments.count) if seen is None else seen.to(self._moments.count)
        self._restored = {}

    @override
    def stop(self) -> None:
        if self._taps is not None:
            self._taps.remove()
        if self._clean is not None:
            self._clean.remove()
        self._taps = self._clean = self._labels = None

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        # the first batch of a fit is heard for its shape
        if self._taps is None or not (self._first or batches_left < (self._batches or 1)):
            return
        self._first = False
        self._labels = self._labels_of(batch)
        self._taps.armed = self._labels is not None
        self._taps.mask = padding_mask(batch)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._taps is None or self._labels is None or self._tap is None or self._moments is None:
            return
        self._taps.armed = False
        heard, labels = self._taps.pop().get(self._tap.name), self._labels
        self._labels = None
        if heard is None:
            return
        own = self._labels_heard(heard, labels)
        if own is None:
            return
        if self._batches is None:
            self._batches = min(-(-self._wanted // max(heard.returned, 1)), self._between(trainer))
        if batches_left < self._batches:
            self._moments.update(heard.rows, own)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> Sequence[Point]:
        assert self._tap is not None and self._moments is not None  # noqa: PT018  # `start` has made them
        moments = self._moments.reduce() if world_size() > 1 else self._moments
        self._moments = self._empty(pl_module)
        self._seen = moments.count if self._seen is None else self._seen + moments.count
        return self._points(self._tap, self._tap.name, step, moments, self._seen)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._clean is None or not is_pass_due(trainer, self.epochs):
            return
        reading = self._clean.run(trainer, pl_module, self._empty(pl_module))
        if reading is None:
            return
        step = max(logging_step(trainer) - 1, 0)  # that of the epoch's last batch
        tap = self._clean.tap
        self.publish(
            trainer, pl_module, self._points(tap, f"{tap.name}.eval", step, reading.moments, None, reading.agreement)
        )

    def _points(
        self,
        tap: Tap,
        layer: str,
        step: int,
        moments: ClassMoments,
        seen: Tensor | None,
        agreement: Tensor | None = None,
    ) -> list[Point]:
        """Points of statistics that all processes share."""
        classifier: Any = tap.module
        weight = whole(classifier.weight)
        found = measures(moments, weight.to(moments.shift), seen=seen)
        names = [*_VALUES, "classes", "n"]
        numbers = [*(found[name] for name in names), moments.nonfinite]
        if agreement is not None:
            numbers += [1 - agreement[0] / agreement[1].clamp_min(1), agreement[1]]
        values = torch.stack([number.to(found["n"]) for number in numbers]).tolist()  # the one transfer of a point
        readings, [lost, *nc4] = dict(zip(names, values, strict=False)), values[len(names) :]
        n = int(readings["n"])
        flag = Flag.NONFINITE if lost else Flag.OK
        if nc4:
            readings["nc4"] = nc4[0] if nc4[1] else nan
            if n and not nc4[1]:
                self.warn_once(
                    "`loader` could not be gone through twice; NC4 reads NaN. Pass a function that makes it."
                )
        if not n:
            flag = Flag.FEW_ROWS if lost else Flag.NOT_CALLED
            self.warn_once(f"`{layer}` received no labelled rows before a point; its curves read NaN there.")
            readings |= dict.fromkeys(_VALUES, nan)
        readings["flag"] = float(flag)
        nulls = {"nc1": nc1_null(n, int(readings["classes"]), self._shape[1])}
        return [
            Point(FAMILY, layer, name, step, readings[name], n, nulls.get(name, nan), flag)
            for name in _CURVES
            if name in readings
        ]

    def _choose(self, pl_module: LightningModule) -> Tap:
        call = f"`NeuralCollapseMonitor(layer={self.layer!r})`"
        if self.layer is None:
            taps = [tap for tap in default_taps(pl_module) if tap.side == "input"]
        else:
            try:
                taps = find_taps(pl_module, [f"{self.layer}:input"])
            except ValueError as error:
                raise MisconfigurationException(f"{call}: {error}") from error
        if len(taps) != 1:
            raise MisconfigurationException(f"{call} must name one classifier, and there are {len(taps)}.")
        weight = getattr(taps[0].module, "weight", None)
        if not isinstance(weight, Tensor) or torch.nn.parameter.is_lazy(weight) or weight.ndim != 2 or len(weight) < 2:
            raise MisconfigurationException(
                f"{call}: a classifier has a weight of shape (C, d) with at least two classes, and `{taps[0].name}` has"
                " none. Name the layer that returns the logits."
            )
        if weight.shape[1] > MAX_DIM:
            raise MisconfigurationException(
                f"{call}: the scatter of {weight.shape[1]} features would take {weight.shape[1] ** 2 * 8 / 2**30:.1f}"
                f" GiB; up to {MAX_DIM} are watched. Feed `NeuralCollapse` with projected features instead."
            )
        return taps[0]

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

    def _between(self, trainer: Trainer) -> int:
        return (self.cadence(trainer) or 1) * trainer.accumulate_grad_batches

    def _labels_of(self, batch: Any) -> Tensor | None:
        try:
            labels = targets_of(batch) if self.labels is None else self.labels(batch)
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

    def _labels_heard(self, heard: Captured, labels: Tensor) -> Tensor | None:
        """The label of every row that was heard; -100 for padding."""
        if heard.returned != labels.numel():
            self.warn_once(
                f"the classifier received {heard.returned} rows and the batch has {labels.numel()} labels; such batches"
                " are left out. Say which labels belong to its rows with `labels=`."
            )
            return None
        labels = evenly(labels.flatten().to(heard.rows.device).long(), len(heard.rows))
        return torch.where(heard.mask, labels, -100)
