"""Drift monitor: how far the features of a layer have moved from a reference, how fast, and whether they settle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from math import nan
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.evaluation.evaluation_pass import has_forward
from lightning_collapse.callbacks.evaluation.feature_pass import (
    MAX_DIM,
    OUTPUT,
    ROWS,
    FeaturePass,
    counterparts,
    finite_rows,
)
from lightning_collapse.callbacks.evaluation.preserved_fit import batches_on_device
from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.drift import ks_p_value, output_kl
from lightning_collapse.monitoring.drift_course import DriftCourse
from lightning_collapse.monitoring.feature_drift import DIRECTIONS, DriftReference
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.arguments import check_layers, require_positive
from lightning_collapse.utilities.distributed import all_gather_rows, all_reduce_sum, max_over_processes
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.loaders import Loader, shuffles
from lightning_collapse.utilities.modules import Tap, default_taps, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.private_torch import tree_leaves
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.trainer import planned_steps

LEAST_ROWS, PROBE_BATCHES, SELDOM = 16, 8, 10
_NEVER = {"start": {"cka"}, "batches": {"changed"}, "module": {"changed", "rate", "jump"}}  # of a kind of reference
_OPEN = "0 to infinity"


class DriftMonitor(Monitor):
    """Log how far features are from a reference, layer by layer, in deviations of the reference.

    Features always drift while a network trains. What tells is a drift that jumps (``jump``), one that does not settle
    (``bounded``) and outputs that leave those of a network that was to be kept (``output_kl``). **Logged metrics**,
    ``drift/{layer}/...``, to every logger and to ``trainer.callback_metrics``; nulls and, of ``mmd2`` and ``level``,
    standard errors are in the points:

    {curves}

    Against ``"start"`` rows of training batches are compared, 512 at most over all processes, so that network and data
    both count; the reference is the first point that has as many, or else the second. A loader, or a frozen copy of the
    network, compares two networks on the same inputs, in eval mode: no drift reads 0, and ``cka`` and ``output_kl`` are
    there. Training does not notice: modes, random states and buffers are as before. Layers wider than 512 are watched
    through a random projection; ``overlap`` is of layers up to 256 wide.

    ``changed`` keeps its ``level`` for a layer over the whole run if rows are independent, as tokens of one sequence
    are not. ``jump`` has that level for all layers together (:class:`~lightning_collapse.rules.Detector`); both are
    curves, with one line in the log at the first jump of a layer, and no failure.

    Args:
        layers: Names of submodules, or glob patterns of them; ``None`` takes up to a dozen by the rule of
            ``default_taps``.
        reference: ``"start"``; or batches (a ``DataLoader`` in a fixed order, or a function that returns one), of which
            eight at most are read at the start and at every point; or a module with the same layers, which is moved to
            the device of the model and called on the batch that ends in a point (other inputs every time: no ``rate``).
        every_n_steps: Optimizer steps between two points. ``None`` is ten times ``Trainer(log_every_n_steps)``.
        level: Allowed false alarms of a run.
        kl_bound: Divergence of the outputs, in nats, above which a warning is given, once; ``None`` for none.
        detail: ``"low"`` keeps ``n`` and ``flag`` from loggers.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, if there is no
            such layer, the module has no ``forward``, the loader is empty or shuffles, or the reference has other
            layers.

    Example::

        trainer = Trainer(callbacks=[DriftMonitor(every_n_steps=100)])
    """

    family = "drift"
    declares = (
        Curve("mmd2", "mean of random features", "about 0 to 2", "does not tell", "Gretton et al., JMLR 2012"),
        Curve("w1", "sorted projections, mean over directions", _OPEN, "does not tell", "Villani 2009"),
        Curve("ks", "distribution functions of projections, mean", "0 to 1", "does not tell", "Smirnov 1948"),
        Curve("psi", "histograms of projections, mean over directions", _OPEN, "does not tell"),
        Curve("changed", "largest distance of distribution functions", "0 or 1", "1: another law, at the level"),
        Curve("cka", "pairs of features of the same inputs, debiased", "about 0 to 1", "near 0", "arXiv 2010.15327"),
        Curve("overlap", "eight leading directions", "0 to 1", "near 8 / D"),
        Curve("rate", "projections, since the point before", _OPEN, "jumps"),
        Curve("jump", "sequential test of the logarithm of the rate", "0 to 2", "1 or more, at the level"),
        Curve("level", "autoregression of `w1`: where it returns to", _OPEN, "does not tell", "arXiv 2510.07777"),
        Curve("half_life", "autoregression of `w1`: points to lose half of a deviation", _OPEN, "growing"),
        Curve("bounded", "Dickey-Fuller test of `w1` at 5 %, from 50 points on", "0 or 1", "0 late in training"),
        Curve("output_kl", "outputs against the reference's, in nats", _OPEN, "above your bound"),
        Curve("n", "rows behind the point, over all processes", "0 to 512", "few: noise counts"),
        Curve("flag", "features", "0 to 6", "above 0: why to doubt the point"),
    )
    identity = ("layers", "compared_with", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        reference: Literal["start"] | nn.Module | Loader = "start",
        every_n_steps: int | None = None,
        level: float = 0.01,
        kl_bound: float | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "the default layers")
        starts = isinstance(reference, str) and reference == "start"
        known = not isinstance(reference, str | Mapping | Iterator | Tensor)
        if not starts and not (known and (isinstance(reference, Iterable) or callable(reference))):
            raise ValueError(
                "`reference` takes 'start', a frozen module, an iterable of batches or a function without arguments"
                f" that returns one, and no iterator, which is read once only; got {reference!r}."
            )
        if not 0 < level < 1:
            raise ValueError(f"`level` must be between 0 and 1, got {level}.")
        if kl_bound is not None:
            require_positive(kl_bound=kl_bound)
            if starts:
                raise ValueError(
                    "`kl_bound` compares outputs on the same inputs: pass a module or batches as `reference`."
                )
        self.layers, self.reference, self.level, self.kl_bound = layers, reference, level, kl_bound
        is_module = isinstance(reference, nn.Module)
        self.compared_with = "start" if starts else "module" if is_module else "batches"
        self._forget()

    def _forget(self) -> None:
        self._taps: list[Tap] = []
        self._pass: FeaturePass | None = None
        self._reference_pass: FeaturePass | None = None
        self._references: dict[str, DriftReference] = {}
        self._outputs: Tensor | None = None
        self._previous: dict[str, Tensor] = {}
        self._before: dict[str, int] = {}
        self._courses: dict[str, DriftCourse] = {}
        self._fingerprint = 0.0
        self._batch: Any = None

    @override
    def cadence(self, trainer: Trainer) -> int:
        return super().cadence(trainer) * (SELDOM if self.every_n_steps is None else 1)

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()
        self._taps = self.choose_taps(self.layers, default_taps(pl_module), pl_module)
        self._device, self._sharing = pl_module.device, max(len(self._taps), 1)
        self._planned = (planned_steps(trainer) or 0) // max(self.cadence(trainer), 1) or None
        if self.compared_with == "start":
            choose = partial(default_taps, pl_module) if self.layers is None else None
            self.window = FeatureWindow(
                pl_module,
                self._taps,
                pl_module.device,
                ROWS,
                0.0,
                MAX_DIM,
                ROWS,
                containment=self.contained,
                choose=choose,
            )
            return
        if not has_forward(pl_module):
            raise MisconfigurationException(
                f"`DriftMonitor` calls the module, and {type(pl_module).__name__} has no `forward`. Write one, or"
                " compare with `reference='start'`."
            )
        let_hooks_be_seen(pl_module)
        self._pass = FeaturePass(self._taps, self.contained)
        if isinstance(self.reference, nn.Module):
            taps = counterparts(self.reference.to(pl_module.device), self._taps, pl_module)
            self._reference_pass = FeaturePass(taps, self.contained)
        else:
            self._probe(trainer, pl_module, self._pass)

    @override
    def stop(self) -> None:
        for one in (self._pass, self._reference_pass):
            if one is not None:
                one.hooks.remove()
        self._pass = self._reference_pass = self._batch = None
        self._taps = []

    @property
    @override
    def listeners(self) -> list[HookOwner]:
        return [*super().listeners, *([] if self._pass is None else [self._pass.hooks])]

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        super().before_batch(trainer, batch, batches_left)
        self._batch = batch if self.compared_with == "module" else None

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        super().after_batch(trainer, pl_module, batches_left)
        self._batch = None if batches_left else self._batch

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        known, readings = len(self._references), dict[Name, Tensor]()
        if self.window is not None:
            self._taps = self.window.taps
            for name, layer in self.window.features().items():
                rows, mask = all_gather_rows(layer.rows.float(), layer.mask)
                readings |= self._compare(name, finite_rows(rows, mask), int(mask.sum()))
        elif self._pass is not None:
            readings = self._read_pairs(trainer, pl_module, self._pass)
        if len(self._references) > known:
            self._say_size()
        return readings

    def _read_pairs(self, trainer: Trainer, pl_module: LightningModule, own: FeaturePass) -> dict[Name, Tensor]:
        """Readings of two networks on the same inputs."""
        batch, self._batch = self._batch, None
        given: Iterable[tuple[Any, bool]] = [(batch, True)]
        if isinstance(self.reference, nn.Module) and self._reference_pass is not None:
            kept = self._reference_pass.run(trainer, self.reference, given, pl_module.device)
            self._outputs = kept.pop(OUTPUT, None)
            self._references = {
                name: DriftReference(found, paired=True) for name, found in kept.items() if len(found) >= LEAST_ROWS
            }
            self._previous = {}  # of other inputs
        else:
            given = self._batches(trainer, pl_module)
        now = own.run(trainer, pl_module, given, pl_module.device)
        outputs, before = now.pop(OUTPUT, None), self._outputs
        readings: dict[Name, Tensor] = {}
        for name, rows in now.items():
            there = [len(self._references[name].rows)] if name in self._references else []
            readings |= self._compare(name, rows, max([len(rows), *there]))
        if outputs is not None and before is not None and outputs.shape == before.shape and len(outputs):
            readings[OUTPUT, "output_kl"] = output_kl(before, outputs)
        return readings

    def _batches(self, trainer: Trainer, pl_module: LightningModule) -> Iterable[tuple[Any, bool]]:
        loader: Any = self.reference
        return islice(batches_on_device(loader, trainer, pl_module), PROBE_BATCHES)

    def _probe(self, trainer: Trainer, pl_module: LightningModule, own: FeaturePass) -> None:
        """Take the reference from the first pass over the batches, and refuse those that none can be taken from."""
        call, device, seen = "`DriftMonitor(reference=...)`", pl_module.device, list[Tensor]()
        if shuffles(self.reference):
            raise MisconfigurationException(f"{call}: its loader shuffles, and points need the same. `shuffle=False`.")
        dtype = accumulation_dtype(device)

        def watched() -> Iterable[tuple[Any, bool]]:
            for batch, counts in self._batches(trainer, pl_module):
                leaves = [leaf.to(dtype) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and counts]
                seen.append(sum((leaf.nan_to_num().sum() for leaf in leaves), torch.zeros((), dtype=dtype).to(device)))
                yield batch, counts

        try:
            rows = own.run(trainer, pl_module, watched(), device)
        except RuntimeError as error:
            raise MisconfigurationException(f"{call}: the pass over its batches failed: {error}") from error
        if not max_over_processes([len(seen)], device)[0]:
            raise MisconfigurationException(f"{call}: there is no batch in it. Pass batches as the training has them.")
        self._fingerprint = float(all_reduce_sum(sum(seen, torch.zeros((), dtype=dtype).to(device))))
        self._outputs = rows.pop(OUTPUT, None)
        if not any(len(found) >= LEAST_ROWS for found in rows.values()):
            most = max((len(found) for found in rows.values()), default=0)
            raise MisconfigurationException(
                f"{call}: its batches bring {most} rows of finite features, and {LEAST_ROWS} are needed. Pass more."
            )
        for name, found in rows.items():
            if len(found) >= LEAST_ROWS:
                self._references[name] = DriftReference(found, paired=True)
                self._warn_if_constant(name)
        self._say_size()

    def _compare(self, name: str, rows: Tensor, seen: int) -> dict[Name, Tensor]:
        """Readings of one layer; without a reference they become one, if there are as many as there will be."""
        own = {"n": torch.tensor(len(rows)), "seen": torch.tensor(seen)}
        reference = self._references.get(name)
        enough = len(rows) >= (LEAST_ROWS if self._points else ROWS)
        if reference is None and enough and self.window is not None:
            self._references[name] = DriftReference(rows)
            self._warn_if_constant(name)
        elif reference is not None and reference.constant:
            own["constant"] = torch.ones(())
        elif reference is not None and len(rows) >= LEAST_ROWS and rows.shape[1] == reference.rows.shape[1]:
            previous = self._previous.get(name)
            found = reference.compare(rows, previous)
            self._before[name] = 0 if previous is None else previous.shape[1]
            self._previous[name] = found.projections
            own |= found.readings
        return {(name, key): value for key, value in own.items()}

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points: list[Point] = []
        for tap in self._taps:
            own = {key: value for (name, key), value in numbers.items() if name == tap.name}
            points += self._points_of(tap.name, step, own)
        divergence = numbers.get((OUTPUT, "output_kl"))
        if divergence is not None:
            points.append(Point(self.family, OUTPUT, "output_kl", step, divergence, null=0.0))
            if self.kl_bound is not None and divergence > self.kl_bound:
                self.warn_once(
                    f"the outputs have left those of the reference: their divergence passed {self.kl_bound}."
                )
        return points

    def _points_of(self, name: str, step: int, own: Mapping[str, float]) -> list[Point]:
        n, reference = int(own.get("n", 0)), self._references.get(name)
        drawn = ("mmd2", "w1", "ks", "psi", "cka", "overlap", "rate")
        values = {key: own.get(key, nan) for key in drawn}
        values |= self._decide(name, step, own, n)
        error = {"mmd2": own.get("mmd2_deviation", nan), "level": values.pop("error")}
        nulls = {} if "w1" not in own or reference is None else reference.nulls(n, self._before.get(name, 0))
        flag = _flag(n, int(own.get("seen", 0)), "constant" in own)
        if flag == Flag.NOT_CALLED:
            self.warn_of_layer(name)
        values |= {"n": float(n), "flag": float(flag)}
        never = _NEVER[self.compared_with] | (set() if reference and reference.overlaps else {"overlap"})
        return [
            Point(self.family, name, key, step, value, n, nulls.get(key, nan), flag, error.get(key, nan))
            for key, value in values.items()
            if key not in never
        ]

    def _decide(self, name: str, step: int, own: Mapping[str, float], n: int) -> dict[str, float]:
        """Whether the law is another one, whether the rate has jumped, and where the distance settles."""
        course = self._courses.setdefault(name, self._new_course())
        jump, new = course.jump(step, own.get("rate", nan))
        if new:
            rank_zero_info(f"`DriftMonitor`: `{name}` drifts faster since step {course.since}, seen at {step}.")
        found = {"changed": nan, "jump": jump if "rate" in own else nan} | course.settle(own.get("w1", nan))
        if "ks_largest" in own and self.compared_with == "start":
            kept = len(self._references[name].rows)
            found["changed"] = course.changed(ks_p_value(own["ks_largest"], kept, n, DIRECTIONS))
        return found

    def _new_course(self) -> DriftCourse:
        return DriftCourse(self._planned, self._sharing, self.level)

    @override
    def state(self) -> dict[str, Any]:
        kept = {} if self.compared_with == "module" else self._references
        return {
            "references": {name: reference.rows for name, reference in kept.items()},
            "outputs": None if self.compared_with == "module" else self._outputs,
            "previous": dict(self._previous),
            "courses": {name: course.state_dict() for name, course in self._courses.items()},
            "fingerprint": self._fingerprint,
        }

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        if abs(state["fingerprint"] - self._fingerprint) > 1e-5 * (1 + abs(self._fingerprint)):
            raise ValueError("the batches of `reference` are not those of the checkpoint; read them in a fixed order")
        device, paired = self._device, self.compared_with != "start"
        if self.compared_with != "module":
            self._references = {n: DriftReference(kept.to(device), paired) for n, kept in state["references"].items()}
            self._outputs = None if state["outputs"] is None else state["outputs"].to(device)
        self._previous = {name: kept.to(device) for name, kept in state["previous"].items()}
        for name, kept in state["courses"].items():
            self._courses[name] = self._new_course()
            self._courses[name].load_state_dict(kept)

    def _warn_if_constant(self, name: str) -> None:
        if self._references[name].constant:
            self.warn_once(
                f"the features of `{name}` in the reference are all equal, so that nothing can be compared with them:"
                " its curves read NaN. Choose other `layers`, or take the reference later."
            )

    def _say_size(self) -> None:
        rows = [reference.rows for reference in self._references.values()]
        size = sum(kept.numel() * kept.element_size() for kept in rows) / 2**20
        if self.compared_with != "module":
            rank_zero_info(f"`DriftMonitor` keeps a reference of {len(rows)} layers, {size:.2f} MiB, in its state.")


def _flag(n: int, seen: int, constant: bool) -> Flag:
    if not seen:
        return Flag.NOT_CALLED
    if constant:
        return Flag.CONSTANT
    return Flag.FEW_ROWS if n < LEAST_ROWS else Flag.NONFINITE if n < seen else Flag.OK
