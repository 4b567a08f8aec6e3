"""Curves of neural regression collapse: features and weight of the head against the targets of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Monitor
from lightning_collapse.functional.intrinsic_dimension import two_nn_of_distances
from lightning_collapse.functional.regression_collapse import regression_collapse
from lightning_collapse.monitoring.feature_buffer import FeatureBuffer
from lightning_collapse.monitoring.feature_hooks import FeatureHooks
from lightning_collapse.monitoring.sampling_plan import SamplingPlan
from lightning_collapse.spectral.neighbors import nearest_distances
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_gather_rows, max_over_processes, world_size
from lightning_collapse.utilities.features import evenly, padding_mask
from lightning_collapse.utilities.modules import Tap, default_taps, find_taps, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.targets import TARGET_KEYS, target_rows, targets_of
from lightning_collapse.utilities.weight_matrices import weight_matrices

FAMILY = "regression_collapse"
_NRC = "Andriopoulos et al. 2024, arXiv 2409.04180"
_ROWS = "rows"

for _name, _facts in {
    "nrc1": {"reads": "features outside of as many principal axes as targets", "range": "0 to 1", "collapsed": "0"},
    "nrc2": {"reads": "features outside of the row space of the head", "range": "0 to 1", "collapsed": "0"},
    "nrc3": {"reads": "shape of the head against that of the targets", "range": "0 to 4", "collapsed": "0"},
}.items():
    register_curve(FAMILY, _name, source=_NRC, **_facts)
for _name, _facts in {
    "intrinsic_dimension": {
        "reads": "distances of features to the two nearest rows",
        "range": "0 to the head's inputs",
        "collapsed": "below that of the targets",
        "source": "Facco et al. 2017; arXiv 2510.01105",
    },
    "target_dimension": {
        "reads": "distances of targets to the two nearest rows",
        "range": "0 to the number of targets",
        "collapsed": "does not tell",
        "source": "Facco et al. 2017; arXiv 2510.01105",
    },
    "n": {"reads": "rows behind the point"},
    "flag": {"reads": "0, or why to doubt the point"},
}.items():
    register_curve(FAMILY, _name, **_facts)


class RegressionCollapseMonitor(Monitor):
    """Log how far a regression head and its features have collapsed onto the shape of the targets.

    **Logged metrics**, to every logger and to ``trainer.callback_metrics``:

    - ``regression_collapse/{head}/nrc1``, ``nrc2``, ``nrc3``: see :func:`~lightning_collapse.functional.nrc1`,
      :func:`~lightning_collapse.functional.nrc2` and :func:`~lightning_collapse.functional.nrc3`; 0 is collapsed, and
      ``nrc3`` is NaN for a single target;
    - ``regression_collapse/{head}/intrinsic_dimension``, ``target_dimension``: of the features and of the targets, see
      :func:`~lightning_collapse.functional.two_nn`; the latter at most the number of targets;
    - ``regression_collapse/{head}/n``, ``flag``: rows behind the point, over all processes, and why to doubt it.

    In regression collapse is not a goal: features of a lower dimension than the targets generalize worse, which
    :class:`~lightning_collapse.CollapseGuard` reports as ``regression_over_compression``.

    A point rests on the training batches right before it, in training mode (the paper measures on the training data);
    the weight is that after the step.

    Args:
        head: Name of the layer that returns the predictions; ``None`` is the last Linear layer.
        targets: From a batch to its targets, ``(N, n)`` or ``(N,)``, as the loss sees them. ``None`` takes the second
            element of ``(x, y)``, or what a mapping has under ``targets``, ``target``, ``labels``, ``label`` or ``y``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows per point, over all processes. The cost of a point grows with its square.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, if there is no
            such layer, more than one, or one without a weight.

    Example::

        trainer = Trainer(callbacks=[RegressionCollapseMonitor(targets=lambda batch: batch["price"])])
    """

    family = FAMILY

    def __init__(
        self,
        head: str | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        every_n_steps: int | None = None,
        rows: int = 256,
    ) -> None:
        super().__init__(every_n_steps)
        if rows < 3:
            raise ValueError(f"`rows` must be at least 3, got {rows}.")
        if targets is not None and not callable(targets):
            raise ValueError(f"`targets` must be a function of a batch, or None, got {targets!r}.")
        self.head = head
        self.targets = targets
        self.rows = rows
        self._restored: dict[str, Any] = {}
        self._name = ""
        self._taps: FeatureHooks | None = None
        self._weight: Callable[[], Tensor] | None = None
        self._target_rows: Tensor | None = None
        self._plan: SamplingPlan | None = None
        self._planned = False
        self._width = 0
        self._store = FeatureBuffer(max_dim=1 << 31)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(head=self.head, every_n_steps=self.every_n_steps, rows=self.rows)

    @override
    def state_dict(self) -> dict[str, Any]:
        plan = list(self._plan) if self._plan else []
        return {"plan": plan, "width": self._width, "rows": self._store.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tap = self._choose(pl_module)
        matrices = weight_matrices(tap.module)
        if len(matrices) != 1:
            raise MisconfigurationException(
                f"`RegressionCollapseMonitor(head={self.head!r})`: the layer holds {len(matrices)} weight matrices."
                " Name the one Linear layer that returns the predictions."
            )
        self._name, self._weight = tap.name.removesuffix(".input"), matrices[0].read
        let_hooks_be_seen(pl_module)
        self._taps = FeatureHooks([tap], self.rows)
        self._plan, self._planned, self._width = None, False, 0
        state, self._restored = self._restored, {}
        if state.get("plan"):
            self._plan, self._planned, self._width = SamplingPlan(*state["plan"]), True, state["width"]
            if world_size() == 1:  # a checkpoint holds the rows of one process: with several the window starts anew
                self._store.load_state_dict(state["rows"], [_ROWS], pl_module.device)

    @override
    def stop(self) -> None:
        if self._taps is not None:
            self._taps.remove()
        self._taps = self._weight = self._target_rows = None
        self._store.clear()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        window = self._plan.batches if self._plan else 1
        # the first batch of a fit is heard for its shapes
        if self._taps is not None and (not self._planned or batches_left < window):
            self._taps.armed = True
            self._taps.mask = padding_mask(batch)
            # now, since a step may change its batch in place
            self._target_rows = self._targets_of(batch)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._taps is None or not self._taps.armed:
            return
        self._taps.armed = False
        heard = next(iter(self._taps.pop().values()), None)
        targets, self._target_rows = self._target_rows, None
        joint = mask = None
        if heard is not None and targets is not None:
            if heard.returned == len(targets):
                dtype = accumulation_dtype(heard.rows.device)  # the same on every process, whatever came
                kept = evenly(targets, len(heard.rows)).to(heard.rows.device)
                joint, mask = torch.cat([heard.rows.to(dtype), kept.to(dtype)], dim=1), heard.mask
            else:
                self.warn_once(
                    f"`{self._name}` received {heard.returned} rows for {len(targets)} targets; its curves read NaN."
                    " Pass `targets=` a function that returns one row of targets per row of features."
                )
        if self._plan is None and (not self._planned or batches_left == 0):
            self._planned = True
            facts = [0, 0, 0] if heard is None or joint is None else [len(joint), joint.shape[1], heard.rows.shape[1]]
            # waits for the device off the step path: once, or at points while there were no rows yet
            per_batch, width, self._width = map(int, max_over_processes(facts, pl_module.device))
            if per_batch:
                between = (self.cadence(trainer) or 1) * trainer.accumulate_grad_batches
                self._plan = SamplingPlan.make(self.rows, width, per_batch, between)
        if joint is not None and mask is not None and self._plan is not None and batches_left < self._plan.batches:
            self._store.add(_ROWS, joint, mask, self._plan.rows_per_batch)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> Sequence[Point]:
        numbers = [nan] * 3 + [0.0] + [nan, 0.0] * 2 + [0.0] * 2
        if self._plan is not None and self._weight is not None:
            joint, mask = self._store.read(_ROWS, self._plan.width, pl_module.device)
            weight = self._weight()  # collective, if it is sharded
            joint, mask = all_gather_rows(joint.to(accumulation_dtype(joint.device)), mask)
            targets = self._plan.width - self._width
            if weight.shape != (targets, self._width):
                self.warn_once(
                    f"`{self._name}` returns {len(weight)} numbers for {targets} targets; `nrc2` and `nrc3` read NaN."
                    " Pass `head=` the layer that returns the predictions alone, or `targets=`."
                )
                reading = _read(joint, mask, self._width, None)
            else:
                reading = _read(joint, mask, self._width, weight.to(joint.device))
            numbers = reading.tolist()  # the one transfer of a point
        self._store.clear()
        first, second, third, n, dimension, behind, of_targets, behind_targets, different, seen = numbers
        flag = _flag(int(n), int(different), int(seen))
        if flag == Flag.NOT_CALLED:
            self.warn_once(
                f"there were no rows of `{self._name}` with targets before a point; its curves read NaN there."
            )
        key = FAMILY, self._name
        values = {"nrc1": (first, n), "nrc2": (second, n), "nrc3": (third, n)}
        values |= {"intrinsic_dimension": (dimension, behind), "target_dimension": (of_targets, behind_targets)}
        values |= {"n": (n, n), "flag": (float(flag), n)}
        return [Point(*key, name, step, value, int(of), flag=flag) for name, (value, of) in values.items()]

    def _choose(self, pl_module: LightningModule) -> Tap:
        if self.head is None:
            taps = [tap for tap in default_taps(pl_module) if tap.side == "input"]
            problem = "the model has no Linear layer."
        else:
            try:
                taps = find_taps(pl_module, [f"{self.head}:input"])
            except ValueError as error:
                raise MisconfigurationException(f"`RegressionCollapseMonitor(head={self.head!r})`: {error}") from error
            problem = f"it matches {len(taps)} layers. Name one."
        if len(taps) != 1:
            raise MisconfigurationException(f"`RegressionCollapseMonitor(head={self.head!r})`: {problem}")
        return taps[0]

    def _targets_of(self, batch: Any) -> Tensor | None:
        try:
            found = targets_of(batch) if self.targets is None else self.targets(batch)
            if isinstance(found, Tensor):
                return target_rows(found).clone()
            problem = f"returned {type(found).__name__}"
        except Exception as error:  # a function of the user's must not end the run
            problem = f"raised {error!r:.200}"
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


def _read(joint: Tensor, mask: Tensor, width: int, weight: Tensor | None) -> Tensor:
    """NRC1 to NRC3 and their rows, both dimensions each with its rows, different features, considered rows."""
    features, targets = joint[:, :width], joint[:, width:]
    finite = mask & joint.sum(dim=1).isfinite()
    collapse = regression_collapse(features, targets, weight, finite)
    found = nearest_distances(features, 2, finite)
    own, others = two_nn_of_distances(*found), two_nn_of_distances(*nearest_distances(targets, 2, finite))
    ceiling = own.n.new_tensor(float(targets.shape[1]))
    # rounded targets tie, which lifts the estimate; it cannot be more than there are
    of_targets = torch.where(others.dimension > ceiling, ceiling, others.dimension)
    numbers = [*collapse[:4], own.dimension, own.n, of_targets, others.n, found[1].sum(), mask.sum()]
    return torch.stack([number.to(own.n) for number in numbers])


def _flag(n: int, different: int, seen: int) -> Flag:
    if not seen:
        return Flag.NOT_CALLED
    if n > 1 and different == 1:
        return Flag.CONSTANT
    if different < 3:
        return Flag.FEW_ROWS
    return Flag.NONFINITE if n < seen else Flag.OK
