"""Output failures: one class for all, a policy that explores no more, logits whose log-partition grows ever faster."""

from collections.abc import Mapping
from math import isfinite
from statistics import median
from typing import Any

from lightning_collapse.rules.base import UNDECIDED, DetectorRule, Rule, register_rule
from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.growth import Growth
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import SURE
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Point

FIRST = 64
"""Points whose median is the beginning."""
GONE, EXPLORED, ENOUGH = 0.01, 0.1, 16
"""Shares of log V below which a policy explores no more, and above which it did at its first point; points to tell."""


class Fall(Detector):
    """A detector of a fall that remembers where the curve began, and that it has rung.

    Attributes:
        onset: Step since when the level has fallen, at the first alarm; ``None`` before.

    Args:
        planned: Points of a whole run; ``None`` for unknown, which counts as 1,000.

    Example:
        >>> fall = Fall(planned=60)
        >>> for step in range(40):
        ...     _ = fall.update(step, (2.0 if step < 30 else 0.1) * (1 + 0.01 * (step * 7 % 5)))
        >>> round(fall.beginning, 2), fall.onset
        (2.02, 29)
    """

    def __init__(self, planned: int | None = None) -> None:
        super().__init__(planned, side="fall", transform="log")
        self.onset: int | None = None
        self._first: list[float] = []
        self._when: list[int] = []

    @property
    def beginning(self) -> float:
        """Median of the first 64 points, or of all so far; 0 before there is one."""
        return median(self._first) if self._first else 0.0

    def update(self, step: int, value: float) -> float:
        """Take another point in."""
        if isfinite(value) and len(self._first) < FIRST:
            self._first.append(float(value))
            self._when.append(step)
        statistic = super().update(step, value)
        if statistic >= 1 and self.onset is None:
            self.onset = step if self.since is None else self.since
        return statistic

    def below(self, level: float) -> int | None:
        """The step of the first of these points that is below a level."""
        return next((step for step, value in zip(self._when, self._first, strict=False) if value < level), None)

    def restart(self) -> None:
        """Forget that it has rung, with the same beginning."""
        super().restart()
        self.onset = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {
            "detector": super().state_dict(),
            "first": list(self._first),
            "when": list(self._when),
            "onset": self.onset,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state_dict["detector"])
        self._first, self.onset = list(state_dict["first"]), state_dict["onset"]
        self._when = list(state_dict.get("when", ()))


@register_rule
class OutputEntropyCollapse(Rule):
    """The entropy of a policy has fallen to a tenth of the median of its first 64 points, and a detector has seen it.

    Both must be so: a :class:`~lightning_collapse.rules.Detector` of a fall of the logarithm, with a budget of one
    false alarm in a hundred runs, has rung since the run began, and the level is a tenth, for three points. The
    detector is armed after 16 points in runs of at most 200, after 64 in longer ones; before nothing is said.
    Supervised training lowers the entropy of its outputs as it should, so it judges by itself for the task
    ``"reinforcement"`` alone; of others name it in ``CollapseGuard(rules=[...])``. It is over at twice the line. A
    fall as slow as the run, of a hundredth in 1,000 points, the detector takes for the way of the curve. That rewards
    run dry as the entropy does is the finding of Cui et al. (2025, arXiv 2505.22617); the numbers are ours.

    Of a policy that explored at its first point, and for most of the first points has less than a hundredth of log V,
    it is a notice from the 16th on: no detector can have seen the fall, and what is solved so early may be sure.

    Example:
        >>> from lightning_collapse.rules import Judge
        >>> judge = Judge(["output_entropy_collapse"])
        >>> judge.planned = 60
        >>> for step in range(40):
        ...     entropy = (2.0 if step < 30 else 0.1) * (1 + 0.01 * (step * 7 % 5))
        ...     _ = judge.update([Point("output", "policy", "entropy", step, entropy, n=256)])
        >>> [verdict.name for verdict in judge.verdicts]
        ['output entropy collapse in `policy`']
    """

    kind = "output_entropy_collapse"
    says = "The policy `{layer}` is sure of its choice nearly everywhere and explores no more."
    family = "output"
    measures = ("entropy",)
    follows = ("entropy",)
    lower_is_worse = ("entropy",)
    calibration = FIRST
    unasked = ("reinforcement",)
    patience = 3
    share = 0.1
    advice = (
        "Return with `Rollback()`, then raise the upper bound of clipping (0.28 for 0.2), or zero the gradient of the"
        " tokens with the largest covariance of log-probability and advantage."
    )
    paper = "Cui et al., 2025, arXiv 2505.22617"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Nothing is told by one point."""
        return 0.0

    def detectors(self, layer: str, planned: int | None) -> Mapping[str, Detector]:
        """Of the entropy."""
        return {"entropy": Fall(planned)}

    def weigh(self, evidence: Evidence) -> float:
        """A tenth of the beginning over the entropy, once the detector has rung."""
        fall, entropy = evidence.detectors["entropy"], evidence.points["entropy"]
        if not isinstance(fall, Fall):
            return 0.0
        if fall.onset is None:
            return GONE * entropy.null / max(entropy.value, 1e-300) if self._began_so(fall, evidence) else 0.0
        return self.share * fall.beginning / max(entropy.value, 1e-300)

    def excuse(self, evidence: Evidence) -> str:
        """That it fell before anything could see it."""
        fall = evidence.detectors["entropy"]
        early = isinstance(fall, Fall) and fall.onset is None and self._began_so(fall, evidence)
        return (
            "it was so before a fall could be seen: no failure if its rewards say that all is solved" if early else ""
        )

    @staticmethod
    def _began_so(fall: Fall, evidence: Evidence) -> bool:
        """Whether the entropy was gone for most of the first points, and there at the very first."""
        curve, most = evidence.history.get("entropy"), evidence.points["entropy"].null
        explored = curve is not None and curve.count >= ENOUGH and curve.first > EXPLORED * most
        return explored and fall.beginning < GONE * most

    def onset(self, evidence: Evidence, since: int) -> int:
        """The step of the detector; else of the first point at which the entropy was gone."""
        fall = evidence.detectors["entropy"]
        found = fall.onset if isinstance(fall, Fall) else None
        if found is None and isinstance(fall, Fall):
            found = fall.below(GONE * evidence.points["entropy"].null)
        return since if found is None else found

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The entropy."""
        entropy = points["entropy"]
        return f"over {entropy.n} rows the entropy of the outputs is {entropy.value:.2g}"

    def tell(self, evidence: Evidence) -> str:
        """The entropy and its beginning."""
        fall = evidence.detectors["entropy"]
        began = fall.beginning if isinstance(fall, Fall) else 0.0
        words = self.evidence(evidence.points, evidence.baseline)
        return f"{words}, where the median of the first {FIRST} points is {began:.2g}"


@register_rule
class PredictionCollapse(Rule):
    """Nearly all rows are predicted to be of one class, though their labels are of several.

    The perplexity of the mean prediction is above one by a tenth of what it is for the labels of the same rows, or
    less, in the median of five points and in each of three, from the eighth on, and does not rise. Where cross-entropy
    trains the head the two are equal, however little it has learned and however rare a class is: at a minimum the
    gradient of a bias is the mean prediction less the frequency. What trains on its own predictions, their confidence
    or their entropy has another minimum, one class for all, and its loss falls towards it. It takes labels in
    the batch, and of several classes; where the loss is not seen to compare the outputs with classes nothing is said.
    That pseudo-labels end there is known from Tanaka et al. (2018, arXiv 1803.11364) and Arazo et al. (2019, arXiv
    1908.02983), who hold the mean prediction to the prior; the numbers are ours.

    Example:
        >>> from lightning_collapse.rules import Judge, Task
        >>> judge, task = Judge(["prediction_collapse"]), Task("classification", outputs=frozenset(["head"]))
        >>> for step in range(20):
        ...     usage = 9.0 if step < 12 else 1.05
        ...     _ = judge.update([Point("output", "head", "usage", step, usage, n=128, null=9.8)], task)
        >>> [verdict.name for verdict in judge.verdicts]
        ['prediction collapse in `head`']
    """

    kind = "prediction_collapse"
    says = "Nearly all inputs are given one and the same class by `{layer}`, whatever their labels."
    family = "output"
    measures = ("usage",)
    follows = ("usage",)
    lower_is_worse = ("usage",)
    patience = 3
    share, several = 0.1, 1.5
    advice = (
        "Return with `Rollback()`, then keep labelled samples in every batch, hold the mean prediction to the prior, or"
        " take fewer and surer pseudo-labels."
    )
    paper = "Arazo et al., 2019, arXiv 1908.02983"

    def applies_to(self, layer: str, task: Task) -> bool:
        """Heads that the loss compares with classes, or with labels that the step has made."""
        return layer in task.outputs and task.name in ("", "classification", "language model")

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Nothing is told by one point."""
        return 0.0

    def weigh(self, evidence: Evidence) -> float:
        """A tenth of what the labels use over what the predictions do, counted from one; undecided while it rises."""
        curve, used = evidence.history.get("usage"), evidence.points["usage"]
        if curve is None or curve.count < SURE or not used.null > self.several:
            return 0.0
        severity = self.share * (used.null - 1) / max(curve.level - 1, used.value - 1, 1e-300)
        return min(severity, UNDECIDED) if curve.direction() == "rising" else severity

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Both perplexities, and the beginning."""
        used = points["usage"]
        return (
            f"over {used.n} rows the mean prediction uses {used.value:.2f} classes, where the labels use"
            f" {used.null:.2f} and the run began with {baseline['usage']:.2f}"
        )


@register_rule
class LogPartitionGrowth(DetectorRule):
    """The log-partition of the logits grows faster than it did, by a detector: a notice, and no failure.

    Without a z-loss nothing keeps it near 0, and no level is a failure: 12 of 32 healthy runs of the zoo reach twice
    log V. Its growth (``rules.Growth``, a budget of one false alarm in a hundred runs) was
    noticed in none of them, and in one of three with such a head that explode. That output logits diverge late in
    training is the finding of Chowdhery et al. (2022, arXiv 2204.02311) and Wortsman et al. (2023, arXiv 2309.14322).

    Example:
        >>> rule = LogPartitionGrowth()
        >>> rule.applies_to("head", "language model"), rule.informative
        (True, True)
    """

    kind = "log_partition_growth"
    says = "The logits of `{layer}` drift, faster and faster."
    family = "output"
    measures = ("log_z_rms",)
    higher_is_worse = ("log_z_rms",)
    recovery = 2
    informative = True
    paper = "Wortsman et al., 2023, arXiv 2309.14322"

    def applies_to(self, layer: str, task: Task) -> bool:
        """Every head."""
        return True

    def detectors(self, layer: str, planned: int | None) -> Mapping[str, Detector]:
        """Of the growth of its root mean square."""
        return {"log_z_rms": Growth(planned)}

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The log-partition, now and at the beginning."""
        now, began = points["log_z_rms"].value, baseline["log_z_rms"]
        return (
            f"the log-partition of the logits is {now:.3g} and grows ever faster, where the run began with {began:.3g}"
        )
