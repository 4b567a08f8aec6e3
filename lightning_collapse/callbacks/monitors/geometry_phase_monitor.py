"""Curves of the geometry of a language model's representations, one token of each sequence, and the phase it is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import nan
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Monitor
from lightning_collapse.functional.geometry_phase import PhaseTracker
from lightning_collapse.functional.isotropic_null import expected_under_isotropy
from lightning_collapse.functional.spectrum_shape import alpha_req
from lightning_collapse.monitoring.evaluate import LayerRows, flag_of, read
from lightning_collapse.monitoring.feature_buffer import FeatureBuffer
from lightning_collapse.monitoring.feature_hooks import FeatureHooks
from lightning_collapse.monitoring.sampling_plan import SamplingPlan
from lightning_collapse.utilities.distributed import max_over_processes, world_size
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.modules import Tap, default_taps, find_taps, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import MEASURES, Measure, register_curve

FAMILY = "geometry"
MAX_ROWS = 2048
_PAPER = "Li et al., NeurIPS 2025, arXiv 2509.23024"
_ALPHA = "weighted least squares over ranks"
_DECAY = {"range": "0 to infinity", "collapsed": "large", "source": "Agrawal et al. 2022, arXiv 2202.05808"}

for _name, _facts in {
    "rankme": {
        "reads": "raw spectrum of one token per sequence",
        "range": "1 to min(n, d)",
        "collapsed": "near 1",
        "source": "Garrido et al. 2023, arXiv 2210.02885",
    },
    "eigenvalue_effective_rank": {
        "reads": "centered spectrum of one token per sequence",
        "range": "1 to min(n - 1, d)",
        "collapsed": "near 1",
        "source": _PAPER,
    },
    "alpha_req_4_100": {"reads": f"{_ALPHA} 4 to 100", **_DECAY},
    "alpha_req_11_100": {"reads": f"{_ALPHA} 11 to 100", **_DECAY},
    "phase": {
        "reads": "turns of the eigenvalue effective rank",
        "range": "1 warm-up, 2 entropy-seeking, 3 compression-seeking",
        "collapsed": "does not tell",
        "source": f"{_PAPER} (the rule is ours)",
    },
    "n": {"reads": "sequences", "range": "0 to 2048", "collapsed": "few: do not read the ranks"},
    "flag": {"reads": "one token per sequence", "range": "0 to 7", "collapsed": "above 0: why to doubt the point"},
}.items():
    register_curve(FAMILY, _name, **_facts)


class GeometryPhaseMonitor(Monitor):
    """Log the spectrum of a language model's last-token representations and the phase of training it shows.

    The phases of Li et al. (arXiv:2509.23024): *warm-up*, the rank falls; *entropy-seeking*, it rises;
    *compression-seeking*, it falls again. They take the last layer's representation of the last token of every
    sequence. **Logged metrics** to every logger and to ``trainer.callback_metrics``:

    - ``geometry/{layer}/rankme``: entropy of the singular values of the representations as they are;
    - ``geometry/{layer}/eigenvalue_effective_rank``: entropy of the eigenvalues of their covariance, which the paper
      reads;
    - ``geometry/{layer}/alpha_req_4_100``, ``alpha_req_11_100``: decay exponent of these eigenvalues, fitted over the
      two ranges of ranks in use;
    - ``geometry/{layer}/phase``: 1, 2 or 3, by :class:`~lightning_collapse.functional.PhaseTracker`;
    - ``geometry/{layer}/n``, ``flag``: sequences behind the point, and why to doubt it.

    A point rests on the sequences of the training batches right before it: four per feature, 2048 at most, as far as
    the cadence has them. Ranks are bounded by their number: do not compare runs, or phases, at different ``n``.

    Args:
        layer: Name of a submodule or ``"name:input"``; ``None`` is the input of the last Linear layer: behind the last
            norm, where there is one.
        position: Which token of a sequence: -1 the last, 0 the first. Counted among real tokens, those without a zero
            in ``batch["attention_mask"]``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Sequences per point, over all processes, instead of the automatic number.
        hysteresis: Relative change of the rank that counts as a turn.
        patience: Points in a row it takes.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, if there is no
            such layer, or more than one.

    Example::

        trainer = Trainer(callbacks=[GeometryPhaseMonitor()])
    """

    family = FAMILY

    def __init__(
        self,
        layer: str | None = None,
        position: int = -1,
        every_n_steps: int | None = None,
        rows: int | None = None,
        hysteresis: float = 0.1,
        patience: int = 2,
    ) -> None:
        super().__init__(every_n_steps)
        if layer is not None and not isinstance(layer, str):
            raise ValueError(f"`layer` takes one name, or None for the input of the last Linear, got {layer!r}.")
        if not isinstance(position, int):
            raise ValueError(f"`position` is the number of a token, -1 for the last, got {position!r}.")
        if rows is not None and rows < 2:
            raise ValueError(f"`rows` must be at least 2, or None for the automatic number, got {rows}.")
        self.layer = layer
        self.position = position
        self.rows = rows
        self.tracker = PhaseTracker(hysteresis, patience)
        self._fresh = self.tracker.state_dict()
        self._restored: dict[str, Any] = {}
        self._taps: FeatureHooks | None = None
        self._name = ""
        self._plan: SamplingPlan | None = None
        self._first = True
        self._store = FeatureBuffer(MAX_ROWS)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layer=self.layer, position=self.position, every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "tracker": self.tracker.state_dict(),
            "plan": list(self._plan) if self._plan else [],
            "rows": self._store.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tap = self._choose(pl_module)
        self._name = tap.name
        let_hooks_be_seen(pl_module)
        self._taps = FeatureHooks([tap], self.rows or MAX_ROWS, self.position)
        self.tracker.load_state_dict(self._restored.get("tracker", self._fresh))
        plan = self._restored.get("plan")
        self._plan = SamplingPlan(*plan) if plan else None
        self._first = self._plan is None
        if self._restored and world_size() == 1:  # a checkpoint holds the rows of one process
            self._store.load_state_dict(self._restored["rows"], [tap.name], pl_module.device)
        self._restored = {}

    @override
    def stop(self) -> None:
        if self._taps is not None:
            self._taps.remove()
        self._taps = None
        self._store.clear()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        window = self._plan.batches if self._plan else 1
        # the first batch of a fit is heard for its shapes
        if self._taps is not None and (self._first or batches_left < window):
            self._first = False
            self._taps.armed = True
            self._taps.mask = padding_mask(batch)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._taps is None or not self._taps.armed:
            return
        self._taps.armed = False
        heard = self._taps.pop().get(self._name)
        if self._plan is None:
            # waits for the device off the step path: once, or at points while the layer has not run yet
            facts = [0, 0] if heard is None else list(heard.rows.shape)
            per_batch, width = map(int, max_over_processes(facts, pl_module.device))
            if per_batch:
                between = (self.cadence(trainer) or 1) * trainer.accumulate_grad_batches
                self._plan = SamplingPlan.make(self.rows or min(4 * width, MAX_ROWS), width, per_batch, between)
        if heard is not None and self._plan is not None and batches_left < self._plan.batches:
            self._store.add(self._name, heard.rows, heard.mask, self._plan.rows_per_batch)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> Sequence[Point]:
        measures = _measures()
        values, finite, seen, top, width = [nan] * len(measures), 0.0, 0.0, nan, 0
        if self._plan is not None:
            width = self._plan.width
            rows, mask = self._store.read(self._name, width, pl_module.device)
            if len(rows) or world_size() > 1:
                [reading], _ = read([LayerRows(rows, mask, self._plan.rows * world_size())], measures)
                finite, seen, top, *values = reading.tolist()  # the one transfer of a point
        self._store.clear()
        n, flag = int(finite), flag_of(int(finite), int(seen), top, False)
        if flag in (Flag.NOT_CALLED, Flag.FEW_ROWS):
            values = [nan] * len(measures)
        if flag == Flag.NOT_CALLED:
            self.warn_once(f"layer `{self._name}` did not run before a point. Choose another `layer`.")
        points = [
            Point(FAMILY, self._name, m.curve, step, value, n, _null(m, n, width), flag)
            for m, value in zip(measures, values, strict=True)
        ]
        before = self.tracker.phase
        phase = self.tracker.update(values[1])
        if phase != before:
            rank_zero_info(
                f"`GeometryPhaseMonitor`: `{self._name}` is {phase.name.lower().replace('_', '-')} at step {step}."
            )
        return [
            *points,
            Point(FAMILY, self._name, "phase", step, float(phase), n, flag=flag),
            Point(FAMILY, self._name, "n", step, float(n), n, flag=flag),
            Point(FAMILY, self._name, "flag", step, float(flag), n, flag=flag),
        ]

    def _choose(self, pl_module: LightningModule) -> Tap:
        if self.layer is None:
            taps = [tap for tap in default_taps(pl_module) if tap.side == "input"]
            problem = "the model has no Linear layer."
        else:
            try:
                taps = find_taps(pl_module, [self.layer])
            except ValueError as error:
                raise MisconfigurationException(f"`GeometryPhaseMonitor(layer={self.layer!r})`: {error}") from error
            problem = f"it matches {len(taps)} layers, {', '.join(tap.name for tap in taps)}. Name one."
        if len(taps) != 1:
            raise MisconfigurationException(f"`GeometryPhaseMonitor(layer={self.layer!r})`: {problem}")
        return taps[0]


def _measures() -> list[Measure]:
    alpha = MEASURES["alpha_req"]
    late = replace(alpha, fn=partial(alpha_req, first=11, last=100), key="alpha_req_11_100")
    return [MEASURES["rankme"], MEASURES["eigenvalue_effective_rank"], alpha, late]


def _null(measure: Measure, n: int, width: int) -> float:
    exact = n > 1 and width > 0 and measure.key != "alpha_req_11_100"
    return expected_under_isotropy(measure.name, n, width) if exact else nan
