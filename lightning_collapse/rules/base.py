"""Rule: what counts as a failure, by comparison with the null and with the run's own baseline."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from math import isfinite
from typing import ClassVar, TypeVar

from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Flag, Point

ALL = "all"
"""What stands for the layer in curves that sum up all layers of a family."""
HEALTHY = 0.5
"""Below this severity a layer is healthy again; between it and 1 nothing changes."""
UNDECIDED = 0.75
"""A severity that changes nothing, of what another rule may judge."""
UNREADABLE = (Flag.NOT_CALLED, Flag.FEW_ROWS, Flag.SOLVER)


class Rule(ABC):
    """Judges one layer at one step from its points and from their baseline, what the first points of the run come to.

    Attributes:
        kind: Name of the verdict.
        says: The failure in one plain sentence, where ``{layer}`` stands for the layer; by default there is none.
        family: First part of the names of the curves it reads.
        measures: Last parts of the names of the curves it reads.
        optional: The same, of curves it reads where a monitor draws them.
            Those of another family are called ``"{family}/{measure}"``.
        follows: Those of its curves whose history it reads, likewise, ``"training/loss"`` among them.
        of_training: Measures of the family :data:`TRAINING` that it reads where they are known.
        lower_is_worse: Those of its measures of which, all else equal, a lower value is never less severe.
        higher_is_worse: The same for higher values. What is in neither has no such direction: the docstring says why.
        calibration: How many first points make the baseline, ``inf`` for all so far; ``None`` leaves it to the guard.
        healthy: Severity below which a layer is healthy again.
        patience: Points in a row it takes; ``None`` leaves it to the guard.
        recovery: Points in a row it takes to be over; ``None`` for as many as it takes to be triggered.
        informative: Whether it is no failure: it is said once and drawn, and nothing else follows from it.
        needs_full_baseline: Whether nothing is judged before the baseline is complete.
        tasks: The tasks it is about, of :data:`~lightning_collapse.rules.TASKS`; empty for all.
        unasked: The tasks for which it judges where no rules were named; empty for all that it is about. For others it
            must be asked for.
        supersedes: Kinds that say nothing more about a layer of which this one is said.
        advice: Which loss, layer or callback of this library addresses it, in one sentence.
        paper: Authors, year, identifier of the finding.

    Example:
        >>> class TooLong(Rule):
        ...     kind, family, measures = "too_long", "length", ("root_mean_square",)
        ...     def severity(self, points, baseline):
        ...         return points["root_mean_square"].value / (10 * baseline["root_mean_square"])
        ...     def evidence(self, points, baseline):
        ...         return "rows are ten times as long"
        >>> point = Point("length", "encoder", "root_mean_square", 9, 30.0)
        >>> TooLong().severity({"root_mean_square": point}, {"root_mean_square": 2.0})
        1.5
    """

    kind: ClassVar[str]
    says: ClassVar[str] = ""
    family: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    follows: ClassVar[tuple[str, ...]] = ()
    of_training: ClassVar[tuple[str, ...]] = ()
    lower_is_worse: ClassVar[tuple[str, ...]] = ()
    higher_is_worse: ClassVar[tuple[str, ...]] = ()
    calibration: ClassVar[float | None] = None
    healthy: ClassVar[float] = HEALTHY
    patience: ClassVar[int | None] = None
    recovery: ClassVar[int | None] = None
    informative: ClassVar[bool] = False
    needs_full_baseline: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ()
    unasked: ClassVar[tuple[str, ...]] = ()
    supersedes: ClassVar[tuple[str, ...]] = ()
    advice: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    @abstractmethod
    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """How bad it looks: 1 or more is a failure, below :attr:`healthy` none; between, or if NaN, nothing changes."""

    @abstractmethod
    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The numbers the verdict rests on, in words."""

    def weigh(self, evidence: Evidence) -> float:
        """The severity, for a rule that reads more than the latest points; called in place of :meth:`severity`."""
        return self.severity(evidence.points, evidence.baseline)

    def tell(self, evidence: Evidence) -> str:
        """The words, for such a rule; called in place of :meth:`evidence`."""
        return self.evidence(evidence.points, evidence.baseline)

    def detectors(self, layer: str, planned: int | None) -> Mapping[str, Detector]:
        """What watches single curves of a layer, by measure, for a rule that leaves that to a detector.

        Args:
            layer: Its name.
            planned: Points of the whole run, if that is known.
        """
        return {}

    def onset(self, evidence: Evidence, since: int) -> int:
        """Step since when it is so, for a rule that knows better than ``since``, the first of the points in a row."""
        return since

    @cached_property
    def followed(self) -> list[tuple[str, str]]:
        """Family and measure of the curves that it follows."""
        return [
            (family or self.family, measure) for family, _, measure in (name.rpartition("/") for name in self.follows)
        ]

    def update_baseline(self, so_far: float, value: float, count: int) -> float:
        """What ``count`` first values of a curve and the next one come to: the largest of them."""
        return max(so_far, value)

    def readable(self, points: Mapping[str, Point]) -> bool:
        """Whether these points of a layer can be judged."""
        for name in self.measures:  # asked of every layer by every rule: a generator takes three times as long
            point = points.get(name)
            if point is None or not isfinite(point.value) or point.flag in UNREADABLE:
                return False
        return True

    def expected(self, layer: str, points: Mapping[str, Point], baseline: Mapping[str, float], task: Task) -> str:
        """Why this is where training on ``task`` ends, so that it is a notice and no failure; empty if it is not."""
        return ""

    def excuse(self, evidence: Evidence) -> str:
        """Why it is no failure, for a rule that needs more to tell than :meth:`expected` gets; empty if it is one."""
        return self.expected(evidence.layer, evidence.points, evidence.baseline, evidence.task)

    def advise(self, evidence: Evidence) -> str:
        """What addresses it in this run: :attr:`advice`, where a rule knows nothing better."""
        return self.advice

    def applies_to(self, layer: str, task: Task) -> bool:
        """Whether it is about this layer: every one, but not what sums up all of them."""
        return layer != ALL

    def sentence(self, layer: str) -> str:
        """:attr:`says` of a layer, or of :data:`ALL` where none of them stands out."""
        return self.says.replace("{layer}", layer)

    def describe(self, evidence: Evidence, layer: str) -> str:
        """What is wrong in this run, in one plain sentence: :meth:`sentence`, where a rule has but one to say."""
        return self.sentence(layer)

    def worst_layer(
        self, layers: Mapping[str, Mapping[str, Point]], baselines: Mapping[str, Mapping[str, float]]
    ) -> str:
        """Where a failure that is judged from what sums up all layers shows most."""
        return ALL

    def where(
        self,
        layer: str,
        layers: Mapping[str, Mapping[str, Point]],
        baselines: Mapping[str, Mapping[str, float]],
    ) -> str:
        """What a verdict on a layer names: the layer, or for what sums up all of them :meth:`worst_layer`."""
        return self.worst_layer(layers, baselines) if layer == ALL else layer


class DetectorRule(Rule):
    """A rule on what sums up all layers that is left to detectors: no single point is a failure.

    Each of :attr:`measures` has a detector, see :meth:`Rule.detectors`; the surest of them decides, and knows the
    onset.

    Example:
        >>> class Restless(DetectorRule):
        ...     kind, family, measures = "restless", "length", ("root_mean_square",)
        ...     def evidence(self, points, baseline):
        ...         return "the length has shifted"
        >>> Restless().applies_to("encoder", "unknown"), Restless().applies_to("all", "unknown")
        (False, True)
    """

    patience = 1

    def applies_to(self, layer: str, task: Task) -> bool:
        """What sums up all layers only."""
        return layer == ALL

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Nothing: no level is a failure."""
        return 0.0

    def weigh(self, evidence: Evidence) -> float:
        """How sure the surest detector is."""
        return max((detector.statistic for detector in evidence.detectors.values()), default=0.0)

    def onset(self, evidence: Evidence, since: int) -> int:
        """Where the level shifted, as far as that detector knows."""
        surest = max(evidence.detectors.values(), key=lambda detector: detector.statistic)
        return since if surest.since is None else surest.since


RuleClass = TypeVar("RuleClass", bound=type[Rule])
RULES: dict[str, Rule] = {}


def register_rule(cls: RuleClass) -> RuleClass:
    """Make a rule known to every :class:`~lightning_collapse.CollapseGuard`, under its kind.

    Example:
        >>> @register_rule
        ... class TooLong(Rule):
        ...     kind, family, measures = "too_long", "length", ("root_mean_square",)
        ...     def severity(self, points, baseline):
        ...         return points["root_mean_square"].value / (10 * baseline["root_mean_square"])
        ...     def evidence(self, points, baseline):
        ...         return "rows are ten times as long"
        >>> isinstance(RULES.pop("too_long"), TooLong)
        True
    """
    RULES[cls.kind] = cls()
    return cls
