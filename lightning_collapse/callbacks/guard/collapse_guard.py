"""From curves to a verdict: which collapse, in which layer, since which step, on what evidence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.guard.arguments import Action, check_actions, check_rules
from lightning_collapse.callbacks.guard.required_monitors import fed, require_fed
from lightning_collapse.callbacks.guard.rollback import Rollback
from lightning_collapse.callbacks.guard.switch_on import SwitchOn
from lightning_collapse.callbacks.guard.task_inference import infer_task
from lightning_collapse.reporting import log_text, publish
from lightning_collapse.rules import ALL, RULES, TASKS, Rule, Task, Verdict, VerdictGrouper
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.trainer import logging_step, save_checkpoint

EXPECTED = "expected "
"""What the key of a failure that the task leads to begins with."""


class CollapseGuard(Callback):
    """Says what fails, in which layer and since when, and acts; reads the points of every monitor of the trainer.

    Each verdict compares with what noise of the same size reads and with the run's own beginning; the rules
    (:mod:`lightning_collapse.rules`) say how, and of which paper. With ``CollapseMonitor``: *complete collapse*
    (:class:`~lightning_collapse.rules.CompleteCollapse`), *dimensional collapse*
    (:class:`~lightning_collapse.rules.DimensionalCollapse`) and *non finite* features
    (:class:`~lightning_collapse.rules.NonFinite`); with ``SpectralAlignmentMonitor`` *loss explosion*
    (:class:`~lightning_collapse.rules.LossExplosion`); with ``AttentionEntropyMonitor`` *attention entropy collapse*
    (:class:`~lightning_collapse.rules.AttentionEntropyCollapse`) and *attention overload*
    (:class:`~lightning_collapse.rules.AttentionOverload`); with ``PlasticityMonitor`` *plasticity loss*
    (:class:`~lightning_collapse.rules.PlasticityLoss`); with ``ContinualMetrics`` *catastrophic forgetting*
    (:class:`~lightning_collapse.rules.CatastrophicForgetting`); with ``RegressionCollapseMonitor`` *regression
    over-compression* (:class:`~lightning_collapse.rules.RegressionOverCompression`); with ``NeuralCollapseMonitor``
    *minority collapse* (:class:`~lightning_collapse.rules.MinorityCollapse`), and as news without any action *neural
    collapse reached* (:class:`~lightning_collapse.rules.NeuralCollapseReached`).

    A verdict falls after ``patience`` points in a row on the wrong side of the line, and is lifted only by as many on
    the right side of twice the line, where a rule does not know better: a curve that trembles about the line says
    nothing. What fails together, or soon after, is one verdict that names the first layer and then the others, see
    :class:`~lightning_collapse.rules.VerdictGrouper`.

    The task decides which rules apply and what is expected: the last features of a classifier or of a regression may
    end in as few directions as there are classes less one, or targets, and that is news and no failure. It is told with
    ``task``, or inferred and said when training starts, see
    :func:`~lightning_collapse.callbacks.task_inference.infer_task`; an unknown one changes nothing.

    **Logged metrics**: ``guard/{kind}``, such as ``guard/complete_collapse``, the number of layers so judged; with a
    ``SwitchOn`` also ``guard/switch_on/{name}``, the share of the weight. Plain stopping on a single curve is
    ``EarlyStopping``'s business.

    Args:
        action: What to do when a verdict falls: ``"warn"``, ``"log"`` (a text to every logger that takes one),
            ``"checkpoint"`` (save one into ``dirpath``), ``"stop"`` (the fit), a
            :class:`~lightning_collapse.Rollback`, a :class:`~lightning_collapse.SwitchOn`, a callable that is given the
            trainer, the module and the :class:`~lightning_collapse.rules.Verdict`, or a list of these, done in order.
        patience: Points in a row it takes, where a rule does not know better.
        calibration: How many first points are the beginning that later ones are compared with, likewise.
        dirpath: Where ``"checkpoint"`` and a rollback save; a folder ``guard`` beside the run's logs by default.
        rules: Kinds to judge, such as ``["complete_collapse"]``; ``None`` for all that monitors draw the curves of.
        task: One of :data:`~lightning_collapse.rules.TASKS`; ``None`` to infer it.

    Attributes:
        verdicts: Every :class:`~lightning_collapse.rules.Verdict` so far, in order.
        news: What rules found that are no failure, as verdicts; each layer's once.
        task: The :class:`~lightning_collapse.rules.Task` it takes the fit for.

    Raises:
        ValueError: On an unknown action, kind or task, on two actions that exclude each other, on a rule that is not
            about the task, or a number that is not positive; as ``MisconfigurationException`` when the fit starts
            without a monitor that draws the curves of any rule, or of one that was asked for.

    Example::

        trainer = Trainer(callbacks=[CollapseMonitor(), CollapseGuard(action=["warn", "stop"])])
    """

    def __init__(
        self,
        action: Action | Sequence[Action] = ("warn", "log"),
        patience: int = 2,
        calibration: int = 3,
        dirpath: str | None = None,
        rules: Sequence[str] | None = None,
        task: str | None = None,
    ) -> None:
        for name, number in (("patience", patience), ("calibration", calibration)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        check_rules(rules, task)
        self.action = action
        self.patience = patience
        self.calibration = calibration
        self.dirpath = dirpath
        self.rules = rules
        self.task = Task(task or "")
        self.verdicts: list[Verdict] = []
        self.news: list[Verdict] = []
        self._told = task
        self._actions: list[Action] = check_actions(action, list(self._rules))
        self._causes = VerdictGrouper(patience)
        self._restored = False
        self._inferred = False
        self._reset()

    def _reset(self) -> None:
        self.verdicts.clear()
        self.news.clear()
        # of every "kind/layer" and curve: how many first values there were, and what they come to
        self._first: dict[str, dict[str, Sequence[float]]] = {}
        # of every "kind/layer" whether it looked healthy at its last point: monitors have their own cadences
        self._healthy: dict[str, bool] = {}
        self._judge_anew()

    def _judge_anew(self) -> None:
        # of every "kind/layer": first step of the row of bad points, its length, length of the row of good points
        self._rows: dict[str, list[int]] = {}
        self._standing: dict[str, bool] = {}
        self._healthy.clear()
        self._causes.clear()

    @property
    def _rules(self) -> dict[str, Rule]:
        """The rules that apply, by kind; looked up and not kept: they travel to spawned processes by name."""
        kinds = RULES if self.rules is None else self.rules
        return {kind: RULES[kind] for kind in kinds if self.task.name in ("", *(RULES[kind].tasks or TASKS))}

    @property
    def _rollbacks(self) -> list[Rollback]:
        return [action for action in self._actions if isinstance(action, Rollback)]

    @property
    def _switches(self) -> list[SwitchOn]:
        return [action for action in self._actions if isinstance(action, SwitchOn)]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "verdicts": [_as_dict(verdict) for verdict in self.verdicts],
            "news": [_as_dict(verdict) for verdict in self.news],
            "first": {layer: {name: list(values) for name, values in of.items()} for layer, of in self._first.items()},
            "rows": {key: list(row) for key, row in self._rows.items()},
            "standing": dict(self._standing),
            "healthy": dict(self._healthy),
            "causes": self._causes.state_dict(),
            "rollbacks": [action.state_dict() for action in self._rollbacks],
            "switches": {action.name: action.state_dict() for action in self._switches},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = True
        self.verdicts[:] = [_from_dict(verdict) for verdict in state_dict["verdicts"]]
        self.news[:] = [_from_dict(verdict) for verdict in state_dict.get("news", ())]
        self._first = state_dict["first"]
        self._rows, self._standing = state_dict["rows"], state_dict["standing"]
        self._healthy = state_dict["healthy"]
        self._causes.load_state_dict(state_dict.get("causes", {}))
        for action, state in zip(self._rollbacks, state_dict["rollbacks"], strict=False):
            action.load_state_dict(state)
        for switch in self._switches:
            if state := state_dict.get("switches", {}).get(switch.name):
                switch.load_state_dict(state)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._restored:
            # of several tasks, each a fit, the later ones are compared with the beginning of the first
            if not any(isinstance(callback, TaskAware) and callback.task_index for callback in trainer.callbacks):
                self._reset()
            for action in (*self._rollbacks, *self._switches):
                action.reset()
        self._restored = self._inferred = False
        self.task = Task(self._told or "")
        require_fed(self._rules, trainer.callbacks, asked=self.rules is not None)
        for switch in self._switches:
            switch.attach(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._inferred:
            return
        self._inferred = True
        self.task = infer_task(trainer, pl_module, batch, self._told)
        self.task = replace(self.task, kinds=fed(self._rules, trainer.callbacks))
        outputs = ", ".join(f"`{layer}`" for layer in sorted(self.task.outputs))
        said = f" How the outputs of {outputs} lie is up to the targets, and not judged." if outputs else ""
        if self.task.name and not self._told:
            rank_zero_info(
                f"`CollapseGuard` takes this for {self.task}, from {self.task.why}. Say otherwise with"
                f" `task=`: {', '.join(TASKS)}.{said}"
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()  # `teardown` is not called when the trainer fails

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_points(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
        """Judge the points of one step; called on every process with the same points."""
        families = _by_family(points)
        rules = [rule for rule in self._rules.values() if rule.family in families]
        if not rules:
            return
        # curves of several tasks have an x-axis of their own
        step, now = points[0].step, logging_step(trainer)
        fallen = [verdict for rule in rules for verdict in self._judge(rule, families[rule.family], step)]
        standing = [key for key, stands in self._standing.items() if stands]
        new = self._causes.sort(self.verdicts, fallen, list(families), standing)
        counts = {rule.kind: 0 for rule in rules}
        for kind in (key.partition("/")[0] for key in standing):
            if kind in counts:
                counts[kind] += 1
        curves = [Point("guard", "", kind, step, float(count)) for kind, count in counts.items()]
        for switch in self._switches:
            switch.update(now, any(key.partition("/")[0] in switch.kinds for key in standing))
            curves.append(Point("guard", "switch_on", switch.name, step, switch.share(now)))
        publish(trainer, pl_module, curves)
        if new:
            self._act(trainer, pl_module, new)
        elif self._rollbacks and all(self._healthy.values()) and self._all_readable(rules, families):
            for action in self._rollbacks:
                action.remember(trainer, pl_module, now, self._folder(trainer))

    def _judge(self, rule: Rule, layers: Mapping[str, Mapping[str, Point]], step: int) -> list[Verdict]:
        """The failures by a rule that are found now."""
        layers = {layer: points for layer, points in layers.items() if rule.readable(points)}
        beginnings = {layer: self._begin(rule, layer, points) for layer, points in layers.items()}
        verdicts = []
        for layer in layers:
            if not rule.judges(layer, self.task) or (rule.waits and not self._is_complete(rule, layer)):
                continue
            points, key = layers[layer], f"{rule.kind}/{layer}"
            severity = rule.severity(points, beginnings[layer])
            expected = rule.expected(layer, points, beginnings[layer], self.task)
            since = self._since(rule, key, 0.0 if expected else severity, step)
            news = rule.informative
            if expected or EXPECTED + key in self._rows:
                expected_since = self._since(rule, EXPECTED + key, severity if expected else 0.0, step)
                since, news = (expected_since, True) if expected else (since, news)
            if not rule.informative:
                ill = severity >= rule.healthy or self._standing.get(key, False)
                self._healthy[key] = bool(expected) or not ill
            if since is not None:
                where = rule.culprit(layers, beginnings) if layer == ALL else layer
                evidence = rule.evidence(points, beginnings[layer]) + (f"; {expected}" if expected else "")
                verdict = Verdict(rule.kind, where, since, step, evidence, severity, "" if news else rule.advice)
                if news:
                    self._tell(verdict)
                else:
                    verdicts.append(verdict)
        return verdicts

    def _all_readable(self, rules: Sequence[Rule], families: Mapping[str, Mapping[str, Mapping[str, Point]]]) -> bool:
        """Whether at least one layer was judged, and none that ran could not be: NaN is not health."""
        judged = False
        for rule in (rule for rule in rules if not rule.informative):
            for layer, points in families[rule.family].items():
                own = (
                    [points[name] for name in rule.measures if name in points] if rule.judges(layer, self.task) else []
                )
                ran = len(own) == len(rule.measures) and all(point.flag != Flag.NOT_CALLED for point in own)
                if ran and not rule.readable(points):
                    return False
                judged = judged or ran
        return judged

    def _tell(self, verdict: Verdict) -> None:
        """Say what is no failure, once."""
        if all((verdict.kind, verdict.layer) != (old.kind, old.layer) for old in self.news):
            self.news.append(verdict)
            rank_zero_info(f"`CollapseGuard` at step {verdict.step}: {verdict}")

    def _begin(self, rule: Rule, layer: str, points: Mapping[str, Point]) -> dict[str, float]:
        """The beginning of a layer's run, which this point may still belong to."""
        first = self._first.setdefault(f"{rule.kind}/{layer}", {})
        drawn = (name for name in rule.optional if name in points and isfinite(points[name].value))
        names = [*rule.measures, *drawn]
        for name in names:
            count, so_far = first.get(name, (0, 0.0))
            value = points[name].value
            if count < (rule.calibration or self.calibration):
                first[name] = [count + 1, rule.fold(so_far, value, int(count)) if count else value]
        return {name: first[name][1] for name in names}

    def _is_complete(self, rule: Rule, layer: str) -> bool:
        counts = [count for count, _ in self._first[f"{rule.kind}/{layer}"].values()]
        return min(counts) >= (rule.calibration or self.calibration)

    def _since(self, rule: Rule, key: str, severity: float, step: int) -> int | None:
        """Since when, if it is found now."""
        patience = rule.patience or self.patience
        row = self._rows.setdefault(key, [step, 0, 0])
        if severity >= 1:
            row[:] = [row[0] if row[1] else step, row[1] + 1, 0]
        elif severity < rule.healthy:
            row[:] = [step, 0, row[2] + 1]
        standing = self._standing.get(key, False)
        if not standing and row[1] >= patience:
            self._standing[key] = True
            return row[0]
        if standing and row[2] >= (rule.recovery or patience):
            self._standing[key] = False
            kind, _, layer = key.partition("/")
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
                self._judge_anew()
        elif callable(action):
            for verdict in verdicts:
                action(trainer, pl_module, verdict)

    def _detach(self) -> None:
        for switch in self._switches:
            switch.detach()

    def _folder(self, trainer: Trainer) -> str:
        return self.dirpath or os.path.join(trainer.log_dir or trainer.default_root_dir, "guard")

    def _save(self, trainer: Trainer, verdict: Verdict) -> None:
        if trainer.fast_dev_run:
            return
        path = os.path.join(self._folder(trainer), f"{verdict.kind}-step={verdict.step}.ckpt")
        save_checkpoint(trainer, path, "CollapseGuard")


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "also": list(verdict.also)}


def _from_dict(state: Mapping[str, Any]) -> Verdict:
    return Verdict(**{**state, "also": tuple(state.get("also", ()))})


def _by_family(points: Sequence[Point]) -> dict[str, dict[str, dict[str, Point]]]:
    """Points by family, layer and measure."""
    families: dict[str, dict[str, dict[str, Point]]] = {}
    for point in points:
        families.setdefault(point.family, {}).setdefault(point.layer, {})[point.measure] = point
    return families
