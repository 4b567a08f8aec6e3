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

from lightning_collapse.callbacks.monitor import Monitor
from lightning_collapse.callbacks.rollback import Rollback
from lightning_collapse.reporting import log_text, publish
from lightning_collapse.rules import ALL, HEALTHY, RULES, Rule
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.trainer import save_checkpoint

UNREADABLE = (Flag.NOT_CALLED, Flag.FEW_ROWS, Flag.SOLVER)


@dataclass(frozen=True)
class Verdict:
    """One collapse that was found.

    Attributes:
        kind: Name of the failure, such as ``"complete_collapse"`` (all rows equal).
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


Action = Literal["warn", "log", "checkpoint", "stop"] | Rollback | Callable[[Trainer, LightningModule, Verdict], None]
ACTIONS = ("warn", "log", "checkpoint", "stop")


class CollapseGuard(Callback):
    """Says when a layer collapses, and acts; reads the points of every monitor of the trainer.

    Each verdict compares with what noise of the same size reads and with the run's own beginning; the rules
    (:mod:`lightning_collapse.rules`) say how. With ``CollapseMonitor``: *complete collapse*
    (:class:`~lightning_collapse.rules.CompleteCollapse`) and *dimensional collapse*
    (:class:`~lightning_collapse.rules.DimensionalCollapse`); with ``SpectralAlignmentMonitor`` *loss explosion*
    (:class:`~lightning_collapse.rules.LossExplosion`); with ``AttentionEntropyMonitor`` *attention entropy collapse*
    (:class:`~lightning_collapse.rules.AttentionEntropyCollapse`) and *attention overload*
    (:class:`~lightning_collapse.rules.AttentionOverload`); with ``RegressionCollapseMonitor`` *regression
    over-compression* (:class:`~lightning_collapse.rules.RegressionOverCompression`); with ``NeuralCollapseMonitor``
    *minority collapse* (:class:`~lightning_collapse.rules.MinorityCollapse`), and as news without any action *neural
    collapse reached* (:class:`~lightning_collapse.rules.NeuralCollapseReached`). A verdict falls after
    ``patience`` points in a row on the wrong side of the line, and is lifted only by as many on the right side of twice
    the line: a curve that trembles about the line says nothing. Fine-tuning a binary classifier to neural collapse
    leaves one direction by nature; watch other layers there.

    **Logged metrics**: ``guard/{kind}``, such as ``guard/complete_collapse``, the number of layers so judged; plain
    stopping on a single curve is ``EarlyStopping``'s business.

    Args:
        action: What to do when a verdict falls: ``"warn"``, ``"log"`` (a text to every logger that takes one),
            ``"checkpoint"`` (save one into ``dirpath``), ``"stop"`` (the fit), a
            :class:`~lightning_collapse.Rollback`, a callable that is given the trainer, the module and the
            :class:`Verdict`, or a list of these, done in order.
        patience: Points in a row it takes.
        calibration: How many first points are the beginning that later ones are compared with, where a rule does not
            know better.
        dirpath: Where ``"checkpoint"`` and a rollback save; a folder ``guard`` beside the run's logs by default.

    Attributes:
        verdicts: Every :class:`Verdict` so far, in order.
        news: What rules found that are no failure, as verdicts; each layer's once.

    Raises:
        ValueError: On an unknown action or a number that is not positive; as ``MisconfigurationException`` when the
            fit starts without a monitor that draws the curves of any rule.

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
        several = isinstance(action, Sequence) and not isinstance(action, str)
        actions: list[Action] = list(action) if several else [action]  # type: ignore[list-item, arg-type]
        for one in actions:
            if isinstance(one, type):  # callable too: its constructor would be given a trainer when a verdict falls
                raise ValueError(f"`action` takes an object, got the class `{one.__name__}`. Write `{one.__name__}()`.")
            if not callable(one) and not isinstance(one, Rollback) and one not in ACTIONS:
                raise ValueError(f"`action` must be among {', '.join(ACTIONS)}, a `Rollback` or callable, got {one!r}.")
        for name, number in (("patience", patience), ("calibration", calibration)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        self.action = action
        self.patience = patience
        self.calibration = calibration
        self.dirpath = dirpath
        self.verdicts: list[Verdict] = []
        self.news: list[Verdict] = []
        self._actions: list[Action] = actions
        self._restored = False
        self._reset()

    def _reset(self) -> None:
        self.verdicts.clear()
        self.news.clear()
        # of every "kind/layer" and curve: how many first values there were, and what they come to
        self._first: dict[str, dict[str, Sequence[float]]] = {}
        # of every "kind/layer": first step of the row of bad points, its length, length of the row of good points
        self._rows: dict[str, list[int]] = {}
        self._standing: dict[str, bool] = {}
        # of every "kind/layer" whether it looked healthy at its last point: monitors have their own cadences
        self._healthy: dict[str, bool] = {}

    @property
    def _rollbacks(self) -> list[Rollback]:
        return [action for action in self._actions if isinstance(action, Rollback)]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "news": [asdict(verdict) for verdict in self.news],
            "first": {layer: {name: list(values) for name, values in of.items()} for layer, of in self._first.items()},
            "rows": {key: list(row) for key, row in self._rows.items()},
            "standing": dict(self._standing),
            "healthy": dict(self._healthy),
            "rollbacks": [action.state_dict() for action in self._rollbacks],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = True
        self.verdicts[:] = [Verdict(**verdict) for verdict in state_dict["verdicts"]]
        self.news[:] = [Verdict(**verdict) for verdict in state_dict.get("news", ())]
        self._first = state_dict["first"]
        self._rows, self._standing = state_dict["rows"], state_dict["standing"]
        self._healthy = state_dict["healthy"]
        for action, state in zip(self._rollbacks, state_dict["rollbacks"], strict=False):
            action.load_state_dict(state)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._restored:
            self._reset()
            for action in self._rollbacks:
                action.reset()
        self._restored = False
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]
        fed = any(
            rule.family == monitor.family and set(rule.measures) <= set(monitor.curves)
            for rule in RULES.values()
            for monitor in monitors
        )
        if not fed:
            needed = "; ".join(f"of {rule.family} {', '.join(rule.measures)}" for rule in RULES.values())
            raise MisconfigurationException(
                "`CollapseGuard` reads the curves of monitors, and no monitor of the trainer draws all that one of its"
                " rules needs. Add `CollapseMonitor()`, `SpectralAlignmentMonitor()` or `AttentionEntropyMonitor()`;"
                f" with `measures` of your own these must be among them: {needed}."
            )

    def on_points(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
        """Judge the points of one step; called on every process with the same points."""
        families = _by_family(points)
        rules = [rule for rule in RULES.values() if rule.family in families]
        if not rules:
            return
        step = points[0].step
        fallen = [verdict for rule in rules for verdict in self._judge(rule, families[rule.family], step)]
        fallen = [verdict for verdict in fallen if not self._is_news(verdict)]
        self.verdicts += fallen
        counts = {rule.kind: 0 for rule in rules}
        for key, standing in self._standing.items():
            kind = key.partition("/")[0]
            if kind in counts:
                counts[kind] += standing
        publish(trainer, pl_module, [Point(f"guard/{kind}", step, float(count)) for kind, count in counts.items()])
        if fallen:
            self._act(trainer, pl_module, fallen)
        elif self._rollbacks and all(self._healthy.values()) and _all_readable(rules, families):
            for action in self._rollbacks:
                action.remember(trainer, pl_module, step, self._folder(trainer))

    def _judge(self, rule: Rule, layers: Mapping[str, Mapping[str, Point]], step: int) -> list[Verdict]:
        """The verdicts of a rule that fall now."""
        layers = {layer: points for layer, points in layers.items() if _readable(rule, points)}
        beginnings = {layer: self._begin(rule, layer, points) for layer, points in layers.items()}
        verdicts = []
        for layer in filter(rule.judges, layers):
            if rule.waits and not self._is_complete(rule, layer):
                continue
            severity = rule.severity(layers[layer], beginnings[layer])
            since = self._since(rule.kind, layer, severity, step)
            key = f"{rule.kind}/{layer}"
            if not rule.informative:
                self._healthy[key] = severity < HEALTHY and not self._standing.get(key, False)
            if since is not None:
                where = rule.culprit(layers, beginnings) if layer == ALL else layer
                evidence = rule.evidence(layers[layer], beginnings[layer])
                verdicts.append(Verdict(rule.kind, where, since, step, evidence))
        return verdicts

    def _is_news(self, verdict: Verdict) -> bool:
        """Whether it is no failure; then it is said, and that was all."""
        if not RULES[verdict.kind].informative:
            return False
        if all((verdict.kind, verdict.layer) != (old.kind, old.layer) for old in self.news):
            self.news.append(verdict)
            rank_zero_info(f"`CollapseGuard` at step {verdict.step}: {verdict}")
        return True

    def _begin(self, rule: Rule, layer: str, points: Mapping[str, Point]) -> dict[str, float]:
        """The beginning of a layer's run, which this point may still belong to."""
        first = self._first.setdefault(f"{rule.kind}/{layer}", {})
        for name in rule.measures:
            count, so_far = first.get(name, (0, 0.0))
            value = points[name].value
            if count < (rule.calibration or self.calibration):
                first[name] = [count + 1, rule.fold(so_far, value, int(count)) if count else value]
        return {name: first[name][1] for name in rule.measures}

    def _is_complete(self, rule: Rule, layer: str) -> bool:
        counts = [count for count, _ in self._first[f"{rule.kind}/{layer}"].values()]
        return min(counts) >= (rule.calibration or self.calibration)

    def _since(self, kind: str, layer: str, severity: float, step: int) -> int | None:
        """Since when, if the verdict falls now."""
        key = f"{kind}/{layer}"
        row = self._rows.setdefault(key, [step, 0, 0])
        if severity >= 1:
            row[:] = [row[0] if row[1] else step, row[1] + 1, 0]
        elif severity < HEALTHY:
            row[:] = [step, 0, row[2] + 1]
        standing = self._standing.get(key, False)
        if not standing and row[1] >= self.patience:
            self._standing[key] = True
            return row[0]
        if standing and row[2] >= self.patience:
            self._standing[key] = False
            rank_zero_info(f"`CollapseGuard`: {kind.replace('_', ' ')} in `{layer}` is over at step {step}.")
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
            else:
                self._call(action, trainer, pl_module, verdicts)

    def _call(self, action: Action, trainer: Trainer, pl_module: LightningModule, verdicts: Sequence[Verdict]) -> None:
        if isinstance(action, Rollback):
            if action.restore(trainer, pl_module, verdicts[0].step):
                self._rows.clear()  # what is restored is judged anew
                self._standing.clear()
                self._healthy.clear()
        elif callable(action):
            for verdict in verdicts:
                action(trainer, pl_module, verdict)

    def _folder(self, trainer: Trainer) -> str:
        return self.dirpath or os.path.join(trainer.log_dir or trainer.default_root_dir, "guard")

    def _save(self, trainer: Trainer, verdict: Verdict) -> None:
        if trainer.fast_dev_run:
            return
        path = os.path.join(self._folder(trainer), f"{verdict.kind}-step={verdict.step}.ckpt")
        save_checkpoint(trainer, path, "CollapseGuard")


def _readable(rule: Rule, points: Mapping[str, Point]) -> bool:
    return all(
        name in points and isfinite(points[name].value) and points[name].flag not in UNREADABLE
        for name in rule.measures
    )


def _all_readable(rules: Sequence[Rule], families: Mapping[str, Mapping[str, Mapping[str, Point]]]) -> bool:
    """Whether at least one layer was judged, and none that ran could not be: NaN is not health."""
    judged = False
    for rule in (rule for rule in rules if not rule.informative):
        for layer, points in families[rule.family].items():
            own = [points[name] for name in rule.measures if name in points] if rule.judges(layer) else []
            ran = len(own) == len(rule.measures) and all(point.flag != Flag.NOT_CALLED for point in own)
            if ran and not _readable(rule, points):
                return False
            judged = judged or ran
    return judged


def _by_family(points: Sequence[Point]) -> dict[str, dict[str, dict[str, Point]]]:
    """Points by family, layer and measure."""
    families: dict[str, dict[str, dict[str, Point]]] = {}
    for point in points:
        family, _, rest = point.key.partition("/")
        layer, _, measure = rest.rpartition("/")
        families.setdefault(family, {}).setdefault(layer, {})[measure] = point
    return families
