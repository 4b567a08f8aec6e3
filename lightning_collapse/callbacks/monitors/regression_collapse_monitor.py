"""Regression collapse monitor: features and weight of a regression head against the targets of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.loss_reader import LossReader, reader_of
from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.intrinsic_dimension import two_nn_of_distances
from lightning_collapse.functional.regression_collapse import regression_collapse
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.monitoring.loss_graph import target_of_loss
from lightning_collapse.monitoring.loss_use import LossUse
from lightning_collapse.spectral.neighbors import nearest_distances
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_gather_rows
from lightning_collapse.utilities.execution import Execution
from lightning_collapse.utilities.modules import Tap, classification_head
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.targets import TARGET_KEYS, target_rows
from lightning_collapse.utilities.weight_matrices import weight_matrices

_NRC = ("0", "Andriopoulos et al. 2024, arXiv 2409.04180")
_TWO_NN = "Facco et al. 2017; arXiv 2510.01105"
_BEHIND = {"nrc1": "n", "nrc2": "n", "nrc3": "n", "intrinsic_dimension": "different", "target_dimension": "distinct"}
"""Which number of rows is behind a curve."""


class RegressionCollapseMonitor(Monitor):
    """Log how far a regression head and its features have collapsed onto the shape of the targets.

    **Logged metrics**, ``regression_collapse/{head}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    See :func:`~lightning_collapse.functional.nrc1`, :func:`~lightning_collapse.functional.nrc2`,
    :func:`~lightning_collapse.functional.nrc3` and :func:`~lightning_collapse.functional.two_nn`. ``nrc3`` is NaN for a
    single target.

    In regression collapse is not a goal: features of a lower dimension than the targets generalize worse, which
    :class:`~lightning_collapse.CollapseGuard` reports as ``regression_over_compression``.

    A point rests on the training batches right before it, in training mode (the paper measures on the training data);
    the weight is that after the step.

    Args:
        head: Name of the layer that returns the predictions; ``None`` is the last Linear layer that
            the first batch runs.
        targets: From a batch to its targets, ``(N, n)`` or ``(N,)``, as the loss sees them. ``None`` takes what the
            first loss compares the head with. Where that cannot be read it is the second element of ``(x, y)``, or what
            a mapping has under ``targets``, ``target``, ``labels``, ``label`` or ``y``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows per point, over all processes. The cost of a point grows with its square.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, if there is no
            such layer, more than one, or one without a weight.

    Example::

        trainer = Trainer(callbacks=[RegressionCollapseMonitor(targets=lambda batch: batch["price"])])
    """

    family = "regression_collapse"
    declares = (
        Curve("nrc1", "features outside of as many principal axes as targets", "0 to 1", *_NRC),
        Curve("nrc2", "features outside of the row space of the head", "0 to 1", *_NRC),
        Curve("nrc3", "shape of the head against that of the targets", "0 to 4", *_NRC),
        Curve(
            "intrinsic_dimension",
            "distances of features to the two nearest rows",
            "0 to the head's inputs",
            "below that of the targets",
            _TWO_NN,
        ),
        Curve(
            "target_dimension",
            "distances of targets to the two nearest rows",
            "0 to the number of targets",
            "does not tell",
            _TWO_NN,
        ),
        Curve("n", "rows behind the point, over all processes"),
        Curve("flag", "0, or why to doubt the point"),
    )
    identity = ("head", "every_n_steps", "rows")

    def __init__(
        self,
        head: str | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        every_n_steps: int | None = None,
        rows: int = 256,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        if rows < 3:
            raise ValueError(f"`rows` must be at least 3, got {rows}.")
        if targets is not None and not callable(targets):
            raise ValueError(f"`targets` must be a function of a batch, or None, got {targets!r}.")
        self.head = head
        self.targets = targets
        self.rows = rows
        self._name = ""
        self._weight: Callable[[], Tensor] | None = None
        self._reader: LossReader | None = None
        self._use: LossUse | None = None
        self._batch: Any = None

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tap = self.choose_tap("head", self.head, pl_module, ":input")
        matrices = weight_matrices(tap.module)
        if len(matrices) != 1:
            raise MisconfigurationException(
                f"`RegressionCollapseMonitor(head={self.head!r})`: the layer holds {len(matrices)} weight matrices."
                " Name the one Linear layer that returns the predictions."
            )
        self._name, self._weight = tap.name.removesuffix(".input"), matrices[0].read
        self._reader = reader_of(pl_module, self.contained) if self.targets is None else None
        self._use = None
        self.window = FeatureWindow(
            pl_module,
            [tap],
            pl_module.device,
            self.rows,
            limit=self.rows,
            paired=True,
            containment=self.contained,
            choose=partial(self._follow, pl_module, tap) if self.head is None else None,
        )

    @override
    def stop(self) -> None:
        if self._reader is not None:
            self._reader.remove()
        self._weight = self._reader = self._batch = None

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._reader is not None:
            self._reader.before_batch(batch)
            self._batch = batch
        if self.window is not None and self.window.wants(batches_left):
            # now, since a step may change its batch in place
            self.window.before_batch(batch, batches_left, self._targets_of(batch))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._reader is None or self._batch is None:
            return
        self._reader.before_backward(loss)
        self._use, self._reader = self._reader.use, None
        found = self._targets_of(self._batch)
        if found is not None and self.window is not None:
            self.window.lay_beside(found)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        super().after_batch(trainer, pl_module, batches_left)
        self._batch = None
        if self._reader is not None:
            self._reader.after_batch()
            self._reader = self._reader if self._reader.waits else None
        if self.window is not None and self.window.unpaired is not None:
            rows, targets = self.window.unpaired
            self.warn_once(
                f"`{self._name}` received {rows} rows for {targets} targets; its curves read NaN."
                " Pass `targets=` a function that returns one row of targets per row of features."
            )

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        layers = {} if self.window is None else self.window.features()
        if not layers or self.window is None or self._weight is None:
            return {}
        [layer], width = layers.values(), self.window.beside_width
        dtype = accumulation_dtype(layer.rows.device)  # the same on every process, whatever came
        beside = layer.rows.new_zeros(0, width) if layer.beside is None else layer.beside
        weight = self._weight()  # collective, if it is sharded
        joint, mask = all_gather_rows(torch.cat([layer.rows.to(dtype), beside.to(dtype)], dim=1), layer.mask)
        if weight.shape != (width, layer.width):
            self.warn_once(
                f"`{self._name}` returns {len(weight)} numbers for {width} targets; `nrc2` and `nrc3` read NaN."
                " Pass `head=` the layer that returns the predictions alone, or `targets=`."
            )
            found = _evaluate(joint[:, : layer.width], joint[:, layer.width :], mask, None)
        else:
            found = _evaluate(joint[:, : layer.width], joint[:, layer.width :], mask, weight.to(joint.device))
        return {(self._name, key): value for key, value in found.items()}

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        if self.window is not None and not self.window.taps:  # another head was chosen just now
            return []
        found = {key: number for (_, key), number in numbers.items()}
        n, seen = int(found.get("n", 0)), int(found.get("seen", 0))
        flag = _flag(n, int(found.get("neighbours", 0)), seen)
        if flag == Flag.NOT_CALLED:
            self.warn_of_layer(
                self._name,
                "there were no rows of {} with targets before a point; its curves read NaN there.",
            )
        points = [
            Point(self.family, self._name, key, step, found.get(key, nan), int(found.get(behind, 0)), flag=flag)
            for key, behind in _BEHIND.items()
        ]
        own = {"n": float(n), "flag": float(flag)}
        return points + [Point(self.family, self._name, key, step, x, n, flag=flag) for key, x in own.items()]

    def _follow(self, pl_module: LightningModule, tap: Tap, order: Execution) -> list[Tap]:
        """The last Linear that the first batch has run, if it can be read."""
        head = classification_head(pl_module, order)
        matrices = [] if head is None else weight_matrices(head.module)
        if head is None or len(matrices) != 1:
            return [tap]
        self._name, self._weight = head.name.removesuffix(".input"), matrices[0].read
        return [head]

    def _targets_of(self, batch: Any) -> Tensor | None:
        try:
            found = target_of_loss(self._use, batch, self._name) if self.targets is None else self.targets(batch)
            if isinstance(found, Tensor):
                return target_rows(found).clone()
            problem = f"returned {type(found).__name__}"
        except Exception as error:  # a function of the user's must not end the run
            problem = f"raised {error!r:.200}"
        if self._reader is not None:
            return None  # its first loss will tell
        if self.targets is None:
            keys = ", ".join(TARGET_KEYS)
            problem = (
                f"found no targets in a batch of type {type(batch).__name__}: they are the second element of `(x, y)`,"
                f" or in a mapping under one of {keys}"
            )
        else:
            problem = f"`targets` {problem} for a batch of type {type(batch).__name__}, where it must return a tensor"
        self.warn_once(
            f"{problem}. All its curves read NaN. Pass `targets=` a function, such as `lambda batch: batch[-1]`."
        )
        return None


def _evaluate(features: Tensor, targets: Tensor, mask: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    """The curves by name; finite and considered rows; different features and targets, and those with neighbours."""
    finite = mask & features.sum(dim=1).isfinite() & targets.sum(dim=1).isfinite()
    collapse = regression_collapse(features, targets, weight, finite)
    found = nearest_distances(features, 2, finite)
    own, others = two_nn_of_distances(*found), two_nn_of_distances(*nearest_distances(targets, 2, finite))
    ceiling = own.n.new_tensor(float(targets.shape[1]))
    # rounded targets tie, which lifts the estimate; it cannot be more than there are
    of_targets = torch.where(others.dimension > ceiling, ceiling, others.dimension)
    values = dict(zip(("nrc1", "nrc2", "nrc3", "n"), collapse[:4], strict=True))
    values |= {"intrinsic_dimension": own.dimension, "target_dimension": of_targets}
    return values | {"different": own.n, "distinct": others.n, "neighbours": found[1].sum(), "seen": mask.sum()}


def _flag(n: int, different: int, seen: int) -> Flag:
    if not seen:
        return Flag.NOT_CALLED
    if n > 1 and different == 1:
        return Flag.CONSTANT
    if different < 3:
        return Flag.FEW_ROWS
    return Flag.NONFINITE if n < seen else Flag.OK
