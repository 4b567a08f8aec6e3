"""Judge: from points to verdicts, with patience, hysteresis and a baseline per layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import isfinite
from typing import Any

from lightning_collapse.rules.base import RULES, Rule
from lightning_collapse.rules.coverage import Coverage
from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.history import TRAINING, Curve, Evidence, History
from lightning_collapse.rules.streak import Change, Streak
from lightning_collapse.rules.task import TASKS, Task
from lightning_collapse.rules.verdict import Verdict
from lightning_collapse.rules.verdict_grouper import Place, VerdictGrouper
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.points import Flag, Point

UNKNOWN = Task()
Points = Mapping[str, Point]
"""Points of one layer at one step, by measure."""


@dataclass(frozen=True)
class Judgement:
    """What the points of one step have changed, and how things stand after them.

    Attributes:
        step: Step of the points.
        judged: Kinds of the rules that read these points; empty if no rule reads any of them.
        new: Verdicts that are new; what only shows an earlier one in another place is none.
        active: Kind and layer of every failure, and of every finding that is none, that is active now.
        recovered: Kind and layer of those that were active before these points and are no more.
        notices: What was found for the first time and is no failure.
        healthy: Whether nothing looks ill at its last point, and nothing that ran at this step could not be read.
        severities: How far beyond its line everything is that was judged, by kind and layer; what is no failure is 0.

    Example:
        >>> judgement = Judge(["non_finite"]).update([Point("collapse", "encoder", "nonfinite_fraction", 9, 0.0, n=64)])
        >>> judgement.healthy, judgement.counts
        (True, {'non_finite': 0})
    """

    step: int = 0
    judged: tuple[str, ...] = ()
    new: tuple[Verdict, ...] = ()
    active: tuple[Place, ...] = ()
    recovered: tuple[Place, ...] = ()
    notices: tuple[Verdict, ...] = ()
    healthy: bool = False
    severities: Mapping[Place, float] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers in which each kind that was judged is active."""
        return {kind: sum(kind == of for of, _ in self.active) for kind in self.judged}

    def is_active(self, *kinds: str) -> bool:
        """Whether a failure of one of these kinds is active in any layer."""
        return any(kind in kinds for kind, _ in self.active)


@dataclass
class Baseline:
    """What the first values of a curve come to.

    Attributes:
        value: What they come to, by :meth:`Rule.update_baseline`.
        count: How many there were.
    """

    value: float
    count: int = 1


class Judge:
    """Applies rules to the points of one step after another; without a trainer, a logger or a device.

    A verdict is triggered after ``patience`` points in a row on the wrong side of the line, and is over only after as
    many on the right side of twice the line, where a rule does not know better: a curve that oscillates near the
    threshold changes nothing. What fails together is one verdict, see :class:`VerdictGrouper`. A rule that raises an
    exception is left out from then on, with one warning.

    Args:
        rules: Kinds to judge by, of :data:`~lightning_collapse.rules.RULES`; ``None`` for all.
        patience: Points in a row it takes, where a rule does not know better.
        calibration: How many first points make the baseline, likewise.

    Attributes:
        planned: How many points the run will have, or each family of curves, where that is known.
        verdicts: Every verdict so far, in order.
        notices: Everything found so far that is no failure, each kind and layer once.
        coverage: What was judged so far, and what not.

    Example:
        >>> judge = Judge(["plasticity_loss"], calibration=1)
        >>> for step, dormant in enumerate([0.0, 0.1, 0.6, 0.7]):
        ...     point = Point("plasticity", "encoder", "dormant_fraction", step, dormant, n=64)
        ...     judgement = judge.update([point])
        >>> judgement.new[0].name, judgement.new[0].since
        ('plasticity loss in `encoder`', 2)
    """

    def __init__(self, rules: Sequence[str] | None = None, patience: int = 2, calibration: int = 3) -> None:
        self.rules = rules
        self.patience = patience
        self.calibration = calibration
        self.planned: int | Mapping[str, int] | None
        self.verdicts: list[Verdict] = []
        self.notices: list[Verdict] = []
        self.coverage = Coverage()
        self._grouper = VerdictGrouper(patience)
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new run begins."""
        self.verdicts.clear()
        self.notices.clear()
        self.coverage.clear()
        self._baselines: dict[Place, dict[str, Baseline]] = {}
        self._history = History()
        self._detectors: dict[Place, dict[str, Detector]] = {}
        self.planned = None
        self._containment = Containment("CollapseGuard")
        self._failed: set[str] = set()
        self.restart()

    def restart(self) -> None:
        """Take what fails next for new, with the same baselines: the state of training was turned back."""
        self._streaks: dict[Place, Streak] = {}
        # where a failure is what the task leads to it has a streak of its own
        self._expected: dict[Place, Streak] = {}
        # whether each looked healthy at its last point: monitors have their own cadences
        self._healthy: dict[Place, bool] = {}
        self._grouper.clear()
        self._history.restart()
        for detectors in self._detectors.values():
            for detector in detectors.values():
                detector.restart()

    def rules_for(self, task: Task) -> dict[str, Rule]:
        """The rules that apply to a task, by kind; looked up and not kept: processes are handed their names alone."""
        unasked = [kind for kind, rule in RULES.items() if not rule.unasked or task.name in rule.unasked]
        kinds = unasked if self.rules is None else self.rules
        return {kind: RULES[kind] for kind in kinds if task.name in ("", *(RULES[kind].tasks or TASKS))}

    def update(self, points: Sequence[Point], task: Task = UNKNOWN) -> Judgement:
        """Judge the points of one step.

        Args:
            points: Of one step, of any families; those of the family ``"training"`` are handed to every rule, or to the
                rules of one family alone if that stands in the place of the layer.
            task: What the network is trained for.
        """
        families, training = _by_family(points)
        known = self.rules_for(task).values()
        rules = [rule for rule in known if rule.family in families]
        self._history.update(points, {curve for rule in known for curve in rule.followed})
        if not rules:
            return Judgement()
        turn = _Turn(points[0].step, task)
        for rule in (rule for rule in rules if rule.kind not in self._failed):
            with self._containment(f"rule `{rule.kind}`", "it judges nothing from now on", partial(self._drop, rule)):
                self._apply(rule, _readable_layers(rule, families, training), turn)
        rules = [rule for rule in rules if rule.kind not in self._failed]
        self.coverage.update(rules, families, task)
        active = tuple(place for place, streak in self._streaks.items() if streak.active)
        new = self._grouper.sort(self.verdicts, turn.triggered, list(families), active)
        healthy = all(self._healthy.values()) and _all_readable(rules, families, task) and not new
        notices = [verdict for verdict in turn.notices if self._is_first(verdict)]
        self.notices += notices
        judged = tuple(rule.kind for rule in rules)
        return Judgement(
            turn.step, judged, tuple(new), active, tuple(turn.recovered), tuple(notices), healthy, turn.severities
        )

    def _apply(self, rule: Rule, layers: Mapping[str, Points], turn: "_Turn") -> None:
        """Judge all layers by one rule."""
        baselines = {layer: self._update_baseline(rule, layer, points) for layer, points in layers.items()}
        for layer, points in layers.items():
            place, baseline = (rule.kind, layer), baselines[layer]
            detectors = self._update_detectors(rule, layer, points, turn.step)
            if not rule.applies_to(layer, turn.task) or (rule.needs_full_baseline and not self._is_full(rule, place)):
                continue
            history = self._history_for(rule, layer)
            evidence = Evidence(layer, points, baseline, history, turn.task, detectors, self._planned_for(rule))
            severity = rule.weigh(evidence)
            expected = rule.excuse(evidence)
            streak = self._streaks.setdefault(place, Streak())
            change = streak.update(rule, self.patience, 0.0 if expected else severity, turn.step)
            if change is Change.RECOVERED:
                turn.recovered.append(place)
            since = streak.since if change is Change.TRIGGERED else None
            if expected or place in self._expected:
                other = self._expected.setdefault(place, Streak())
                other_change = other.update(rule, self.patience, severity if expected else 0.0, turn.step)
                if expected:
                    since = other.since if other_change is Change.TRIGGERED else None
            if not rule.informative:
                self._healthy[place] = bool(expected) or not (severity >= rule.healthy or streak.active)
                turn.severities[place] = 0.0 if expected else severity
            if since is not None:
                where = rule.where(layer, layers, baselines)
                words = rule.tell(evidence) + (f"; {expected}" if expected else "")
                is_notice = rule.informative or bool(expected)
                advice = "" if is_notice else rule.advise(evidence)
                since = rule.onset(evidence, since)
                says = rule.describe(evidence, where)
                verdict = Verdict(rule.kind, where, since, turn.step, words, severity, advice, says=says)
                (turn.notices if is_notice else turn.triggered).append(verdict)

    def _planned_for(self, rule: Rule) -> int | None:
        return self.planned.get(rule.family) if isinstance(self.planned, Mapping) else self.planned

    def _history_for(self, rule: Rule, layer: str) -> dict[str, Curve]:
        """Histories of a layer, by the names that the rule has for them."""
        found = self._history.of(layer, rule.followed, rule.family)
        return {name: found[key] for name, key in zip(rule.follows, rule.followed, strict=True) if key in found}

    def _update_detectors(self, rule: Rule, layer: str, points: Points, step: int) -> dict[str, Detector]:
        """The detectors of a layer, which have seen this point."""
        place = (rule.kind, layer)
        if place not in self._detectors:
            self._detectors[place] = dict(rule.detectors(layer, self._planned_for(rule)))
        for name, detector in self._detectors[place].items():
            if name in points:
                detector.update(step, points[name].value)
        return self._detectors[place]

    def _drop(self, rule: Rule) -> None:
        """Leave a rule out that has raised an exception."""
        self._failed.add(rule.kind)
        for states in (self._streaks, self._expected, self._healthy):
            for place in [place for place in states if place[0] == rule.kind]:
                del states[place]

    def _update_baseline(self, rule: Rule, layer: str, points: Points) -> dict[str, float]:
        """The baseline of a layer, which this point may still belong to."""
        baselines = self._baselines.setdefault((rule.kind, layer), {})
        drawn = (name for name in rule.optional if name in points and isfinite(points[name].value))
        names = [*rule.measures, *drawn]
        for name in names:
            value = points[name].value
            if name not in baselines:
                baselines[name] = Baseline(value)
            elif baselines[name].count < (rule.calibration or self.calibration):
                so_far = baselines[name]
                baselines[name] = Baseline(rule.update_baseline(so_far.value, value, so_far.count), so_far.count + 1)
        return {name: baselines[name].value for name in names}

    def _is_full(self, rule: Rule, place: Place) -> bool:
        counts = [baseline.count for baseline in self._baselines[place].values()]
        return min(counts) >= (rule.calibration or self.calibration)

    def _is_first(self, verdict: Verdict) -> bool:
        return all((verdict.kind, verdict.layer) != (old.kind, old.layer) for old in self.notices)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know: numbers, strings, lists and dicts only."""
        return {
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
            "notices": [verdict.as_dict() for verdict in self.notices],
            "baselines": [
                {"kind": kind, "layer": layer, "curves": {name: asdict(baseline) for name, baseline in curves.items()}}
                for (kind, layer), curves in self._baselines.items()
            ],
            "history": self._history.state_dict(),
            "planned": self.planned,
            "detectors": [
                {"kind": kind, "layer": layer, "states": {name: of.state_dict() for name, of in detectors.items()}}
                for (kind, layer), detectors in self._detectors.items()
                if detectors
            ],
            "streaks": _listed(self._streaks),
            "expected": _listed(self._expected),
            "healthy": [{"kind": kind, "layer": layer, "is": now} for (kind, layer), now in self._healthy.items()],
            "grouper": self._grouper.state_dict(),
            "coverage": self.coverage.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self.verdicts[:] = map(Verdict.from_dict, state_dict["verdicts"])
        self.notices[:] = map(Verdict.from_dict, state_dict["notices"])
        self._baselines = {
            (entry["kind"], entry["layer"]): {name: Baseline(**of) for name, of in entry["curves"].items()}
            for entry in state_dict["baselines"]
        }
        self._history.load_state_dict(state_dict["history"])
        self.planned, self._detectors = state_dict["planned"], {}
        for entry in state_dict["detectors"]:
            rule = RULES.get(entry["kind"])  # of a user, it may be gone, or have other detectors now
            detectors = {} if rule is None else dict(rule.detectors(entry["layer"], self._planned_for(rule)))
            self._detectors[entry["kind"], entry["layer"]] = detectors
            for name in detectors.keys() & entry["states"].keys():
                detectors[name].load_state_dict(entry["states"][name])
        self._streaks, self._expected = (_from_list(state_dict[name]) for name in ("streaks", "expected"))
        self._healthy = {(entry["kind"], entry["layer"]): entry["is"] for entry in state_dict["healthy"]}
        self._grouper.load_state_dict(state_dict["grouper"])
        self.coverage.load_state_dict(state_dict["coverage"])


class _Turn:
    """What is found at one step."""

    def __init__(self, step: int, task: Task) -> None:
        self.step, self.task = step, task
        self.triggered: list[Verdict] = []
        self.notices: list[Verdict] = []
        self.recovered: list[Place] = []
        self.severities: dict[Place, float] = {}


def _readable_layers(
    rule: Rule, families: Mapping[str, Mapping[str, Points]], training: Mapping[str, Points]
) -> dict[str, dict[str, Point]]:
    """Points of the layers that the rule can judge, with those of other families that it reads."""
    others = [(name, *name.rpartition("/")[::2]) for name in rule.optional if "/" in name]
    told = {**training.get("", {}), **training.get(rule.family, {})}
    layers = {}
    for layer, points in families[rule.family].items():
        if rule.readable(points):
            beside = {name: families.get(family, {}).get(layer, {}).get(measure) for name, family, measure in others}
            layers[layer] = {**told, **points, **{name: point for name, point in beside.items() if point}}
    return layers


def _by_family(points: Sequence[Point]) -> tuple[dict[str, dict[str, dict[str, Point]]], dict[str, dict[str, Point]]]:
    """Points by family, layer and measure, and those of the training by what they are for and by measure."""
    families: dict[str, dict[str, dict[str, Point]]] = {}
    for point in points:
        families.setdefault(point.family, {}).setdefault(point.layer, {})[point.measure] = point
    return families, families.pop(TRAINING, {})


def _all_readable(rules: Sequence[Rule], families: Mapping[str, Mapping[str, Points]], task: Task) -> bool:
    """Whether at least one layer was judged, and none that ran could not be: NaN is not health."""
    judged = False
    for rule in (rule for rule in rules if not rule.informative):
        for layer, points in families[rule.family].items():
            if not rule.applies_to(layer, task):
                continue
            if rule.readable(points):
                judged = judged or _ran(rule, points)
            elif _ran(rule, points):
                return False
    return judged


def _ran(rule: Rule, points: Mapping[str, Point]) -> bool:
    """Whether the rule's curves are all there, of a layer that was called."""
    own = [points[name] for name in rule.measures if name in points]
    return len(own) == len(rule.measures) and all(point.flag != Flag.NOT_CALLED for point in own)


def _listed(streaks: Mapping[Place, Streak]) -> list[dict[str, Any]]:
    return [{"kind": kind, "layer": layer, **asdict(streak)} for (kind, layer), streak in streaks.items()]


def _from_list(entries: Sequence[Mapping[str, Any]]) -> dict[Place, Streak]:
    return {(of["kind"], of["layer"]): Streak(of["since"], of["bad"], of["good"], of["active"]) for of in entries}
