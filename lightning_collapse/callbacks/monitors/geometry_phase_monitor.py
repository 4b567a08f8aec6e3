"""Geometry phase monitor: the spectrum of a language model's last tokens, and the phase of training it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import nan
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.geometry_phase import PhaseTracker
from lightning_collapse.functional.isotropic_null import expected_under_isotropy
from lightning_collapse.functional.spectrum_shape import alpha_req
from lightning_collapse.monitoring.evaluate import evaluate, flag_of
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.utilities.execution import Execution
from lightning_collapse.utilities.modules import Tap, classification_head
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import MEASURES, Curve, Measure

MAX_ROWS = 2048
_PAPER = "Li et al., NeurIPS 2025, arXiv 2509.23024"
_ALPHA, _DECAY = (
    "decay of the eigenvalues, weighted least squares over ranks",
    ("0 to infinity", "large", "Agrawal et al. 2022, arXiv 2202.05808"),
)


class GeometryPhaseMonitor(Monitor):
    """Log the spectrum of a language model's last-token representations and the phase of training it shows.

    The phases of Li et al. (arXiv:2509.23024): *warm-up*, the rank falls; *entropy-seeking*, it rises;
    *compression-seeking*, it falls again. They take the last layer's representation of the last token of every
    sequence. **Logged metrics**, ``geometry/{layer}/...``, to every logger and to
    ``trainer.callback_metrics``; the phase is that of :class:`~lightning_collapse.functional.PhaseTracker`:

    {curves}

    A point rests on the sequences of the training batches right before it: four per feature, 2048 at most, as far as
    the cadence has them. Ranks are bounded by their number: do not compare runs, or phases, at different ``n``.

    Args:
        layer: Name of a submodule or ``"name:input"``; ``None`` is the input of the last Linear layer that the first
            batch runs: behind the last norm, where there is one.
        position: Which token of a sequence: -1 the last, 0 the first. Counted among real tokens, those without a zero
            in ``batch["attention_mask"]``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Sequences per point, over all processes, instead of the automatic number.
        hysteresis: Relative change of the rank that counts as a turn.
        patience: Points in a row it takes.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, if there is no
            such layer, or more than one.

    Example::

        trainer = Trainer(callbacks=[GeometryPhaseMonitor()])
    """

    family = "geometry"
    declares = (
        Curve(
            "rankme",
            "raw spectrum of one token per sequence",
            "1 to min(n, d)",
            "near 1",
            "Garrido et al. 2023, arXiv 2210.02885",
        ),
        Curve(
            "eigenvalue_effective_rank",
            "centered spectrum of one token per sequence",
            "1 to min(n - 1, d)",
            "near 1",
            _PAPER,
        ),
        Curve("alpha_req_4_100", f"{_ALPHA} 4 to 100", *_DECAY),
        Curve("alpha_req_11_100", f"{_ALPHA} 11 to 100", *_DECAY),
        Curve(
            "phase",
            "turns of the eigenvalue effective rank",
            "1 warm-up, 2 entropy-seeking, 3 compression-seeking",
            "does not tell",
            f"{_PAPER} (the rule is ours)",
        ),
        Curve("n", "sequences behind the point", "0 to 2048", "few: do not read the ranks"),
        Curve("flag", "one token per sequence", "0 to 7", "above 0: why to doubt the point"),
    )
    identity = ("layer", "position", "every_n_steps")

    def __init__(
        self,
        layer: str | None = None,
        position: int = -1,
        every_n_steps: int | None = None,
        rows: int | None = None,
        hysteresis: float = 0.1,
        patience: int = 2,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
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

    @override
    def state(self) -> dict[str, Any]:
        return {"tracker": self.tracker.state_dict()}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tap = self.choose_tap("layer", self.layer, pl_module)
        self.tracker.load_state_dict(self._fresh)
        rows = self.rows or (lambda width: min(4 * width, MAX_ROWS))
        limit = self.rows or MAX_ROWS
        # the spectrum of so few rows is taken by their side, however wide they are
        self.window = FeatureWindow(
            pl_module,
            [tap],
            pl_module.device,
            rows,
            limit=limit,
            position=self.position,
            containment=self.contained,
            choose=partial(_last_linear, pl_module, tap) if self.layer is None else None,
        )

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        found = {} if self.window is None else evaluate(self.window.features(), _measures())
        return {(name, key): x for name, layer in found.items() for key, x in layer.readings().items()}

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        if self.window is None or not self.window.taps:  # another layer was chosen just now
            return []
        [tap] = self.window.taps
        n, seen = (int(numbers.get((tap.name, key), 0)) for key in ("n", "seen"))
        flag = flag_of(n, seen, numbers.get((tap.name, "top"), nan), False)
        if flag == Flag.NOT_CALLED:
            self.warn_of_layer(tap.name, "{} did not run before a point. Choose another `layer`.")
        width = self.window.plans[tap.name].width if tap.name in self.window.plans else 0
        lost = flag in (Flag.NOT_CALLED, Flag.FEW_ROWS)
        values = {m.curve: nan if lost else numbers[tap.name, m.curve] for m in _measures()}
        nulls = {m.curve: _null(m, n, width) for m in _measures()}
        before, phase = self.tracker.phase, self.tracker.update(values["eigenvalue_effective_rank"])
        if phase != before:
            rank_zero_info(
                f"`GeometryPhaseMonitor`: `{tap.name}` is {phase.name.lower().replace('_', '-')} at step {step}."
            )
        values |= {"phase": float(phase), "n": float(n), "flag": float(flag)}
        return [
            Point(self.family, tap.name, curve, step, value, n, nulls.get(curve, nan), flag)
            for curve, value in values.items()
        ]


def _last_linear(root: LightningModule, tap: Tap, order: Execution) -> list[Tap]:
    return [classification_head(root, order) or tap]


def _measures() -> list[Measure]:
    alpha = MEASURES["alpha_req"]
    late = replace(alpha, fn=partial(alpha_req, first=11, last=100), key="alpha_req_11_100")
    return [MEASURES["rankme"], MEASURES["eigenvalue_effective_rank"], alpha, late]


def _null(measure: Measure, n: int, width: int) -> float:
    exact = n > 1 and width > 0 and measure.key != "alpha_req_11_100"
    return expected_under_isotropy(measure.name, n, width) if exact else nan
