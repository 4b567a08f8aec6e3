"""Curves of neural collapse: how far a classifier's features have folded onto their class means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitor import Monitor
from lightning_collapse.metrics.neural_collapse import measures
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.features import evenly, padding_mask
from lightning_collapse.utilities.modules import Tap, default_taps, find_taps, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.taps import Heard, RowTaps
from lightning_collapse.utilities.targets import targets_of

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
    "classes": ("classes that the window held", "0 to the number of classes", "does not tell", ""),
    "n": ("labelled rows", "0 to infinity", "few: do not read the others", ""),
    "flag": ("features and labels", "0 to 7", "above 0: why to doubt the point", ""),
}
for _name, (_reads, _range, _collapsed, _source) in _CURVES.items():
    register_curve(FAMILY, _name, reads=_reads, range=_range, collapsed=_collapsed, source=_source)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_VALUES = [name for name in _CURVES if name not in ("classes", "n", "flag")]


class NeuralCollapseMonitor(Monitor):
    """Log how far the features of a classifier have folded onto the means of their classes.

    In the terminal phase of training for classification this is expected and no failure. **Logged metrics**, to every
    logger and to ``trainer.callback_metrics``, of the inputs of the classifier, ``neural_collapse/{layer}/...``:

    - ``nc1``: variability, :func:`~lightning_collapse.functional.nc1`;
    - ``nc2_equinorm``, ``nc2_equiangular``, ``nc2_etf``: the class means become a simplex frame;
    - ``nc3``: they align with the rows of the classifier's weight;
    - ``cdnv``, ``vci``: class-distance normalized variance, variability collapse index;
    - ``classes``, ``n``: classes and labelled rows behind the point; classes without rows are left out;
    - ``flag``: 0, or why to doubt the point, see :class:`~lightning_collapse.utilities.Flag`.

    A point rests on the training batches right before it: as many as hold ``rows`` rows, if the cadence has them, with
    the features of the training forward, dropout and augmentation included. The papers measure in eval mode on clean
    data; for that feed a :class:`~lightning_collapse.metrics.NeuralCollapse` in an evaluation loop of your own.
    Statistics are summed in one pass, ``O(C d + d^2)`` numbers; ranks sum theirs.

    Args:
        layer: Name of the classifier; ``None`` is the last Linear layer. What it receives is what is measured.
        labels: A function from the batch to integer labels, as many as the classifier receives rows. ``None`` takes
            the second of a pair, or what a mapping holds under ``label``, ``labels``, ``target``, ``targets`` or ``y``.
            The label -100 is skipped; so are soft labels, with a warning.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows of a point, on each process; ``None`` for two per feature or sixteen per class.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, if there is no
            such classifier, or its input has more than 4096 features.

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
    ) -> None:
        super().__init__(every_n_steps)
        if layer is not None and not isinstance(layer, str):
            raise ValueError(f"`layer` takes one name, or None for the last Linear, got {layer!r}.")
        if labels is not None and not callable(labels):
            raise ValueError(f"`labels` takes a function from a batch to its labels, got {labels!r}.")
        if rows is not None and rows < 2:
            raise ValueError(f"`rows` must be at least 2, or None for the automatic number, got {rows}.")
        self.layer = layer
        self.labels = labels
        self.rows = rows
        self._tap: Tap | None = None
        self._taps: RowTaps | None = None
        self._moments: ClassMoments | None = None
        self._labels: Tensor | None = None
        self._batches: int | None = None  # not known before the first one that was heard
        self._first = True
        self._restored: dict[str, Any] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layer=self.layer, every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        moments = {} if self._moments is None or world_size() > 1 else self._moments.states()
        return {"batches": self._batches, "moments": moments}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tap = self._choose(pl_module)
        let_hooks_be_seen(pl_module)
        self._moments = self._empty(pl_module)
        self._taps = RowTaps([self._tap], self._wanted)
        self._batches = self._restored.get("batches")
        self._first = self._batches is None
        if states := self._restored.get("moments"):
            self._moments = ClassMoments.from_states({key: x.to(pl_module.device) for key, x in states.items()})
        self._restored = {}

    @override
    def stop(self) -> None:
        if self._taps is not None:
            self._taps.remove()
        self._taps = self._labels = None

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
        heard, labels = self._taps.drain().get(self._tap.name), self._labels
        self._labels = None
        if heard is None:
            return
        if heard.returned != labels.numel():
            self.warn_once(
                f"the classifier received {heard.returned} rows and the batch has {labels.numel()} labels; such batches"
                " are left out. Say which labels belong to its rows with `labels=`."
            )
            return
        if self._batches is None:
            self._batches = min(-(-self._wanted // max(heard.returned, 1)), self._between(trainer))
        if batches_left < self._batches:
            self._add(heard, labels)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> Sequence[Point]:
        assert self._tap is not None and self._moments is not None  # noqa: PT018  # `start` has made them
        moments = self._moments.reduce() if world_size() > 1 else self._moments
        found = measures(moments, _whole(self._tap.module.weight).to(moments.shift))
        names = [*_VALUES, "classes", "n"]
        numbers = torch.stack([found[name] for name in names] + [moments.nonfinite.to(found["n"])])
        *values, lost = numbers.tolist()  # the one transfer of a point
        self._moments = self._empty(pl_module)
        readings = dict(zip(names, values, strict=True))
        n = int(readings["n"])
        flag = Flag.NONFINITE if lost else Flag.OK
        if not n:
            flag = Flag.FEW_ROWS if lost else Flag.NOT_CALLED
            self.warn_once(f"`{self._tap.name}` received no labelled rows before a point; its curves read NaN there.")
            readings |= dict.fromkeys(_VALUES, nan)
        readings["flag"] = float(flag)
        return [Point(f"{FAMILY}/{self._tap.name}/{name}", step, readings[name], n, flag=flag) for name in _CURVES]

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
        classes, dim = self._tap.module.get_parameter("weight").shape
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

    def _add(self, heard: Heard, labels: Tensor) -> None:
        assert self._moments is not None
        labels = evenly(labels.flatten().to(heard.rows.device), self._wanted)
        self._moments.update(heard.rows, torch.where(heard.mask, labels, -100))


def _whole(weight: Any) -> Tensor:
    """Of a sharded weight all of it. Collective then."""
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.detach()
