"""From curves to a verdict: which collapse, in which layer, since which step, on what evidence."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_collapse.callbacks.collapse_monitor import CollapseMonitor
from lightning_collapse.callbacks.rules import HEALTHY, RULES, Rule
from lightning_collapse.reporting import log_text, publish
from lightning_collapse.utilities.points import Flag, Point

FAMILY = "collapse/"
UNREADABLE = (Flag.NOT_CALLED, Flag.FEW_ROWS, Flag.SOLVER)


@dataclass(frozen=True)
class Verdict:
    """One collapse that was found.

    Attributes:
        kind: ``"complete_collapse"`` (all rows equal) or ``"dimensional_collapse"`` (few directions left).
        layer: Name of the layer, as in its curves.
        since: Step of the first point that showed it.
        step: Step at which it was held to be true, some points later.
        evidence: The numbers it rests on, in words.
    """

    kind: str
    layer: str
    since: int
    step: int
    evidence: str

    def __str__(self) -> str:
        return f"{self.kind.replace('_', ' ')} in `{self.layer}` since step {self.since}: {self.evidence}."


Action = Literal["warn", "log", "checkpoint", "stop"] | Callable[[Trainer, LightningModule, Verdict], None]
ACTIONS = ("warn", "log", "checkpoint", "stop")


class CollapseGuard(Callback):
    """Says when a layer collapses, and acts; reads the points of every ``CollapseMonitor`` of the trainer.

    Two verdicts, each against what isotropic noise of the same size reads and against the run's own beginning:
    *complete collapse* (:class:`~lightning_collapse.callbacks.rules.CompleteCollapse`) and *dimensional collapse*
    (:class:`~lightning_collapse.callbacks.rules.DimensionalCollapse`). A verdict falls after ``patience`` points in a
    row on the wrong side of the line, and is lifted only by as many on the right side of twice the line: a curve that
    trembles about the line says nothing. Fine-tuning a binary classifier to neural collapse leaves one direction by
    nature; watch other layers there.

    **Logged metrics**: ``guard/complete_collapse`` and ``guard/dimensional_collapse``, the number of layers so judged;
    plain stopping on a single curve is ``EarlyStopping``'s business.

    Args:
        action: What to do when a verdict falls: ``"warn"``, ``"log"`` (a text to every logger that takes one),
            ``"checkpoint"`` (save one into ``dirpath``), ``"stop"`` (the fit), a callable that is given the trainer,
            the module and the :class:`Verdict`, or a list of these, done in order.
        patience: Points in a row it takes.
        calibration: First points of a run whose largest value is the beginning it is compared with.
        dirpath: Where ``"checkpoint"`` saves; a folder ``guard`` beside the run's logs by default.

    Attributes:
        verdicts: Every :class:`Verdict` so far, in order.

    Raises:
        ValueError: On an unknown action or a number that is not positive; as ``MisconfigurationException`` when the
            fit starts without a ``CollapseMonitor`` that draws the curves it reads.

    Example::

        trainer = Trainer(callbacks=[CollapseMonitor(), CollapseGuard(action=["warn", "stop"])])
    """

    def __init__(
        self,
        action: Action | Sequence[Action] = ("warn", "log"),
        patience: int = 2,
        calibration: int = 3,
        dirpath: str | None = None,
    ) -> None:
        actions = [action] if isinstance(action, str) or callable(action) else list(action)
        for one in actions:
            if not callable(one) and one not in ACTIONS:
                raise ValueError(f"`action` must be among {', '.join(ACTIONS)} or callable, got {one!r}.")
        for name, number in (("patience", patience), ("calibration", calibration)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        self.action = action
        self.patience = patience
        self.calibration = calibration
        self.dirpath = dirpath
        self.verdicts: list[Verdict] = []
        self._actions: list[Action] = actions
        self._restored = False
        self._reset()

    def _reset(self) -> None:
        self.verdicts.clear()
        # of every layer: how many points there were and the largest values of the first ones
        self._baselines: dict[str, dict[str, float]] = {}
        self._seen: dict[str, int] = {}
        # of every "kind/layer": first step of the row of bad points, its length, length of the row of good points
        self._rows: dict[str, list[int]] = {}
        self._standing: dict[str, bool] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "baselines": {layer: dict(values) for layer, values in self._baselines.items()},
            "seen": dict(self._seen),
            "rows": {key: list(row) for key, row in self._rows.items()},
            "standing": dict(self._standing),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = True
        self.verdicts[:] = [Verdict(**verdict) for verdict in state_dict["verdicts"]]
        self._baselines, self._seen = state_dict["baselines"], state_dict["seen"]
        self._rows, self._standing = state_dict["rows"], state_dict["standing"]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._restored:
            self._reset()
        self._restored = False
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, CollapseMonitor)]
        needed = {name for rule in RULES for name in rule.measures}
        if not any(needed <= set(monitor.curves) for monitor in monitors):
            raise MisconfigurationException(
                f"`CollapseGuard` reads the curves {', '.join(sorted(needed))}, and no `CollapseMonitor` of the trainer"
                " draws all of them. Add `CollapseMonitor()`, or these names to its `measures`."
            )

    def on_points(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
        """Judge the points of one step; called on every process with the same points."""
        layers: dict[str, dict[str, Point]] = {}
        for point in points:
            if point.key.startswith(FAMILY):
                layer, _, measure = point.key[len(FAMILY) :].rpartition("/")
                layers.setdefault(layer, {})[measure] = point
        if not layers:
            return
        step = points[0].step
        fallen = [
            verdict
            for layer, of_layer in layers.items()
            for rule in self._readable(of_layer)
            if (verdict := self._judge(rule, layer, of_layer, step)) is not None
        ]
        for layer, of_layer in layers.items():
            self._seen[layer] = self._seen.get(layer, 0) + bool(self._readable(of_layer))
        self.verdicts += fallen
        counts = {rule.kind: 0 for rule in RULES}
        for key, standing in self._standing.items():
            counts[key.partition("/")[0]] += standing
        publish(trainer, pl_module, [Point(f"guard/{kind}", step, float(count)) for kind, count in counts.items()])
        if fallen:
            self._act(trainer, pl_module, fallen)

    @staticmethod
    def _readable(points: Mapping[str, Point]) -> list[Rule]:
        return [
            rule
            for rule in RULES
            if all(
                name in points and isfinite(points[name].value) and points[name].flag not in UNREADABLE
                for name in rule.measures
            )
        ]

    def _judge(self, rule: Rule, layer: str, points: Mapping[str, Point], step: int) -> Verdict | None:
        baseline = self._baselines.setdefault(layer, {})
        for name in rule.measures:
            if self._seen.get(layer, 0) < self.calibration:
                baseline[name] = max(baseline.get(name, 0.0), points[name].value)
        severity = rule.severity(points, baseline)
        key = f"{rule.kind}/{layer}"
        row = self._rows.setdefault(key, [step, 0, 0])
        if severity >= 1:
            row[:] = [row[0] if row[1] else step, row[1] + 1, 0]
        elif severity < HEALTHY:
            row[:] = [step, 0, row[2] + 1]
        standing = self._standing.get(key, False)
        if not standing and row[1] >= self.patience:
            self._standing[key] = True
            return Verdict(rule.kind, layer, row[0], step, rule.evidence(points, baseline))
        if standing and row[2] >= self.patience:
            self._standing[key] = False
            rank_zero_info(f"`CollapseGuard`: {rule.kind.replace('_', ' ')} in `{layer}` is over at step {step}.")
        return None

    def _act(self, trainer: Trainer, pl_module: LightningModule, verdicts: Sequence[Verdict]) -> None:
        """Collective: a checkpoint is saved by all processes together."""
        text = "\n".join(f"- {verdict}" for verdict in verdicts)
        for action in self._actions:
            if action == "warn":
                rank_zero_warn(f"`CollapseGuard` at step {verdicts[0].step}:\n{text}")
            elif action == "log":
                for logger in trainer.loggers:
                    log_text(logger, "guard/verdict", text, verdicts[0].step)
            elif action == "checkpoint":
                self._save(trainer, verdicts[0])
            elif action == "stop":
                trainer.should_stop = True
            elif callable(action):
                for verdict in verdicts:
                    action(trainer, pl_module, verdict)

    def _save(self, trainer: Trainer, verdict: Verdict) -> None:
        if trainer.fast_dev_run:
            return
        folder = self.dirpath or os.path.join(trainer.log_dir or trainer.default_root_dir, "guard")
        try:
            trainer.save_checkpoint(os.path.join(folder, f"{verdict.kind}-step={verdict.step}.ckpt"))
        except OSError as error:  # a full disk must not end a run that is only watched
            rank_zero_warn(f"`CollapseGuard` could not save a checkpoint into {folder!r}: {error}")
