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
from lightning_collapse.functional.neural_collapse.nulls import collapse_nulls
from lightning_collapse.monitoring.batch_labels import BatchLabels
from lightning_collapse.monitoring.class_readings import classifier_readings, room_for
from lightning_collapse.monitoring.class_window import ClassWindow
from lightning_collapse.monitoring.feature_hooks import Captured
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.monitoring.loss_targets import LossTargets
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.monitoring.to_host import to_host
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.spectral.seen_classes import SeenClasses, SeenClassMoments
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size
from lightning_collapse.utilities.execution import Execution
from lightning_collapse.utilities.modules import Tap, classifier_head
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.targets import last_token_of
from lightning_collapse.utilities.trainer import logging_step
from lightning_collapse.utilities.weight_matrices import whole

MAX_DIM = 4096
MAX_ROWS = 16_384
_PAPER = "Papyan, Han & Donoho 2020, arXiv 2008.08186"
_WORDS = "Wu & Papyan 2024, arXiv 2405.17767"
_FRAME = "Dang et al. 2023, arXiv 2301.00437"
_ZERO = ("0 to infinity", "near 0")


class NeuralCollapseMonitor(Monitor):
    """Log how far the features of a classifier have folded onto the means of their classes.

    In the terminal phase of training for classification this is expected and no failure. **Logged metrics**, to every
    logger and to ``trainer.callback_metrics``, of the inputs of the classifier, ``neural_collapse/{layer}/...``:

    {curves}

    Classes with fewer than two rows are left out. The curves of imbalance (those of the minority, ``gof_error`` and the
    slopes) are NaN until the largest class has had more than twice the rows of the smallest, in all points so far.
    Points know what features without class structure would read.

    Of a vocabulary only the classes that were seen count: a window has room for 8192 of them (fewer above 1024
    features), rows of others are left out and flagged; of more than 5000 classes random pairs stand for all.

    Labels that the step mixes itself, as mixup and CutMix do, name no class: where the loss shows that it compares the
    logits with soft targets, or with a second set of labels, the batch is left out and flagged, with a warning.

    A point rests on the training batches right before it: as many as hold ``rows`` rows, if the cadence has them, with
    the features of the training forward, dropout and augmentation included. Statistics are summed in one pass,
    ``O(C d + d^2)`` numbers of the ``C`` classes that were seen; ranks sum theirs.

    The papers measure in eval mode on clean data. With a ``loader`` of such data the same is drawn of all of its rows
    at the end of some epochs, as ``neural_collapse/{layer}.eval/...``, and ``nc4`` from a second pass over it,
    which is NaN if the loader can be gone through only once.

    Training does not notice: modes, random states and buffers are as before. Each process goes through what the loader
    gives it, so give it a ``DistributedSampler`` (which repeats some rows if they do not divide evenly); without one
    every process counts all rows. The loader should not share workers or a sampler with state with the training loader.

    Args:
        layer: Name of the classifier; ``None`` is the last Linear layer that the first batch runs, or the fixed
            prototypes behind it (``ETFClassifier``). What it receives is what is measured.
        labels: A function from the batch to integer labels, as many as the classifier receives rows. ``None`` takes
            the second of a pair, or what a mapping holds under ``label``, ``labels``, ``target``, ``targets`` or ``y``;
            those of causal language models that are their inputs move to the outputs that predict them. The label -100
            is skipped; so are soft labels, with a warning.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows of a point, on each process; ``None`` for two per feature or sixteen per class, 16384 at most.
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
        Curve("log_cdnv", "the same, mean of the logarithms over pairs", "any number", "falls", "arXiv 2112.15121"),
        Curve("gnc2", "distances between directions of class means", *_ZERO, _WORDS),
        Curve("unc3", "cosines of class means and classifier rows", "0 to 1", "near 0", _WORDS),
        Curve("vci", "scatter of all that is not between classes", "0 to 1", "near 0", "arXiv 2306.03440"),
        Curve(
            "minority_cosine",
            "classifier rows of the rare classes",
            "-1 to 1",
            "near 1",
            "Fang et al. 2021, arXiv 2101.12699",
        ),
        Curve("minority_norm", "lengths of rare over other classifier rows", *_ZERO, _FRAME),
        Curve("gof_error", "angles between uncentered class means", "0 to 1", "near 0", _FRAME),
        Curve("norm_count_slope", "lengths of classifier rows over class sizes", "any number", "near 1/4", _FRAME),
        Curve("norm_count_slope_means", "lengths of class means over class sizes", "any number", "near -1/4", _FRAME),
        Curve("nc4", "classifier against the nearest class mean", "0 to 1", "near 0", _PAPER),
        Curve("classes", "classes that the window held", "0 to the number of classes", "does not tell"),
        Curve("n", "labelled rows", "0 to infinity", "few: do not read the others"),
        Curve("flag", "features and labels", "0 to 8", "above 0: why to doubt the point"),
    )
    identity = ("layer", "every_n_steps")
    find_head = staticmethod(classifier_head)

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
        if rows is not None and (not isinstance(rows, int) or rows < 2):
            raise ValueError(f"`rows` must be at least 2, or None for the automatic number, got {rows!r}.")
        check_pass(loader, epochs, inputs)
        self.layer = layer
        self.labels = labels
        self.rows = rows
        self.loader = loader
        self.epochs = epochs
        self.inputs = inputs
        self._tap: Tap | None = None
        self._labels_of: BatchLabels | None = None
        self._beside: Tensor | None = None
        self._targets: LossTargets | None = None
        self._step: StepScope | None = None
        self._mixed = torch.zeros(())
        self._clean: EvaluationPass | None = None
        self._rows: ClassWindow | None = None
        self._seen: Tensor | None = None
        self._saved: Mapping[str, Any] = {}

    @override
    def state(self) -> dict[str, Any]:
        if self._rows is None or world_size() > 1:  # a checkpoint holds what one process has seen
            return {} if self._seen is None else {"seen": self._seen}
        return {"window": self._rows.state_dict(), "mixed": self._mixed, "seen": self._seen}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        assert self._rows is not None and self._seen is not None  # `start` has made them  # noqa: PT018
        self._saved = state
        if (seen := state.get("seen")) is not None and len(seen) == len(self._seen):
            self._seen = seen.to(self._seen)
            if "window" in state:
                self._rows.load_state_dict(state["window"])
                self._mixed = state["mixed"].to(self._mixed)

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.loader is not None:
            check_forward(pl_module, self.inputs)
        self._saved, self._labels_of = {}, BatchLabels(self.labels, pl_module, self.warn_once)
        tap = self._choose(pl_module)
        if self.labels is None:  # a function may know what the step does
            self._targets = LossTargets(lambda: getattr(self._tap and self._tap.module, "weight", None), self._fail)
            self._step = StepScope(pl_module)
        self._measure_at(tap, pl_module)
        wanted = self._wanted
        self.window = FeatureWindow(
            pl_module,
            [tap],
            pl_module.device,
            wanted * world_size(),
            limit=wanted,
            paired=True,
            position=last_token_of(pl_module, tap.module),
            take=self._take,
            containment=self.contained,
            choose=partial(self._follow, pl_module, tap) if self.layer is None else None,
        )

    @override
    def stop(self) -> None:
        for part in (self._clean, self._step, self._targets):
            if part is not None:
                part.remove()
        self._clean = self._step = self._targets = self._tap = self._labels_of = self._beside = None
        self._rows = None

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self.window is not None and self.window.wants(batches_left):
            assert self._labels_of is not None
            labels = self._labels_of(batch)
            self._beside = None if labels is None else labels.reshape(-1, 1)
            self.window.before_batch(batch, batches_left, self._beside)
            if self._step is not None and self._targets is not None:
                self._step.request(self._targets)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        super().after_batch(trainer, pl_module, batches_left)
        if self.window is not None and self.window.unpaired is not None and self._labels_of is not None:
            self._labels_of.warn_unpaired(*self.window.unpaired)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        assert self._tap is not None and self._rows is not None and self.window is not None  # noqa: PT018
        if not self.window.taps:  # another classifier was chosen just now
            return {}
        plan = self.window.plans.get(self._tap.name)
        found = self._rows.pop(0 if plan is None else plan.rows)
        mixed, self._mixed = all_reduce_sum(self._mixed), torch.zeros_like(self._mixed)
        assert self._seen is not None
        self._seen = found.add_counts(self._seen)
        return self._readings(self._tap, self._tap.name, found, self._seen) | {(self._tap.name, "mixed"): mixed}

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        if not numbers:
            return []
        found = {name: number for (_, name), number in numbers.items()}
        [layer] = {layer for layer, _ in numbers}
        n, lost, labelled = int(found["n"]), found.pop("nonfinite"), found.pop("labelled")
        mixed, crowded = found.pop("mixed", 0), found.pop("crowded")
        if found.pop("strays", 0):
            self.warn_once(
                f"labels other than 0 to {self._shape[0] - 1}, the classes of `{layer}`, and -100 are left out. Count"
                " classes from 0."
            )
        flag = Flag.NONFINITE if lost else Flag.LEFT_OUT if mixed or crowded else Flag.OK
        if mixed:
            self.warn_once(
                f"the loss compares the rows of `{layer}` with other labels than the batch has, as with mixup inside"
                " `training_step`; such batches are left out. Pass `loader=` of clean data, or `labels=`, a function"
                " that returns the labels that the rows have, and -100 for rows without."
            )
        if not n:
            flag = Flag.FEW_ROWS if lost or labelled else flag or Flag.NOT_CALLED
            if not mixed:
                missing = (
                    "no two rows of one label" if labelled else f"no labelled rows of classes 0 to {self._shape[0] - 1}"
                )
                self.warn_of_layer(layer, f"{{}} received {missing} before a point; its curves read NaN there.")
            found = {name: value if name in ("n", "classes") else nan for name, value in found.items()}
        found["flag"] = float(flag)
        nulls = collapse_nulls(n, int(found["classes"]), self._shape[1])
        if n <= self._shape[1] + 1:
            found["vci"] = nan  # 0 of any rows, as if they had collapsed
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
            found = self._clean.run(trainer, pl_module, self._empty(pl_module.device))
            if found is None:
                return
            tap = self._clean.tap
            nothing = torch.zeros(self._shape[0], device=pl_module.device)
            readings = self._readings(tap, f"{tap.name}.eval", found.seen, found.seen.add_counts(nothing))
            same, compared = found.agreement
            readings[f"{tap.name}.eval", "nc4"] = torch.where(compared > 0, 1 - same / compared, nan)
            step = max(logging_step(trainer) - 1, 0)  # that of the epoch's last batch
            points = self.points(step, to_host(readings))
            if any(point.measure == "nc4" and point.n and point.value != point.value for point in points):
                self.warn_once(
                    "`loader` could not be gone through twice; NC4 reads NaN. Pass a function that makes it."
                )
            self.publish(trainer, pl_module, points)

    def _take(self, name: str, captured: Captured, labels: Tensor | None, batches_left: int) -> None:
        """Add the rows of a batch, or keep them for a point that falls on a short one."""
        assert self._rows is not None and self.window is not None  # noqa: PT018
        if labels is None:
            return
        named = torch.where(captured.mask, labels[:, 0].long(), -100)
        if self._targets is not None and self._beside is not None:
            agree = self._targets.agree(self._beside, self._shape[0])
            if agree is not None:
                self._mixed += torch.where(agree, 0, named >= 0).sum()
                named = torch.where(agree, named, -100)
        self._rows.add(captured.rows, named, early=batches_left >= self.window.plans[name].batches)

    def _fail(self, error: Exception) -> None:
        self.contained.catch("reading what the loss compares", "labels that the step mixes are not noticed", error)

    def _readings(self, tap: Tap, layer: str, found: SeenClasses, seen: Tensor) -> dict[Name, Tensor]:
        classifier: Any = tap.module
        values = classifier_readings(found, whole(classifier.weight), seen)
        return {(layer, name): value for name, value in values.items()}

    def _choose(self, pl_module: LightningModule) -> Tap:
        return self._checked(self.choose_tap("layer", self.layer, pl_module, ":input"))

    def _follow(self, pl_module: LightningModule, tap: Tap, order: Execution) -> list[Tap]:
        """The last Linear that the first batch has run, if it can be read."""
        head = self.find_head(pl_module, order)
        if head is not None and head == self._tap:  # also where a checkpoint has told: the rows since then stay
            return [head]
        if head is None or self.window is None:
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
        self._rows = ClassWindow(partial(self._empty, pl_module.device))
        self._mixed = torch.zeros((), dtype=accumulation_dtype(pl_module.device), device=pl_module.device)
        self._seen = self._mixed.new_zeros(self._shape[0])
        if self._clean is not None:
            self._clean.remove()
        if self.loader is not None and self._labels_of is not None:
            self._clean = EvaluationPass(
                tap, self.loader, self.inputs, self._labels_of, self._labels_of.matching, self.warn_once
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

    def _empty(self, device: torch.device) -> SeenClassMoments:
        classes, dim = self._shape
        return SeenClassMoments(room_for(classes, dim), dim, classes, device)

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
        return self.rows or max(2 * dim, min(16 * classes, MAX_ROWS))
