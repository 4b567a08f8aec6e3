"""Non-finite numbers: rows of features that hold NaN or infinity, and the module that made the first one."""

from collections.abc import Mapping
from math import inf, isfinite, isnan

from lightning_collapse.functional.non_finite import Cause
from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.utilities.points import Point


@register_rule
class NonFinite(Rule):
    """Rows of features hold NaN or infinity, and the training suffers from it.

    Every other rule leaves such rows out, and reads nothing where all are such. It compares with no baseline: one such
    row is one too many, though not one point of them, since 16-bit training overflows and steps back. Rows that the
    model masks, such as padding, may hold anything: as long as loss, gradients and weights are finite, some of the rows
    are no failure. All of the rows are: nothing of the layer is left to read. Where nothing is known of the training
    every such row counts.

    Example:
        >>> values = {"nonfinite_fraction": 0.25}
        >>> points = {name: Point("collapse", "encoder", name, 9, value, n=256) for name, value in values.items()}
        >>> NonFinite().severity(points, {}) >= 1, NonFinite().evidence(points, {})
        (True, '25 % of the rows hold NaN or infinity, and 256 are left to read')
    """

    kind = "non_finite"
    says = "Features are NaN or infinite in `{layer}`."
    family = "collapse"
    measures = ("nonfinite_fraction",)
    of_training = ("nonfinite",)
    higher_is_worse = ("nonfinite_fraction", "nonfinite")
    advice = "Return with `Rollback()`, which lowers the learning rate."
    paper = "Micikevicius et al., 2018, arXiv 1710.03740"

    def readable(self, points: Mapping[str, Point]) -> bool:
        """Also where no row is left to read."""
        return "nonfinite_fraction" in points and not isnan(points["nonfinite_fraction"].value)

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Infinite if there is such a row and the training is not finite, or if there is no other row."""
        lost = points["nonfinite_fraction"].value
        suffers = "nonfinite" not in points or points["nonfinite"].value > 0
        return inf if lost >= 1 or (lost > 0 and suffers) else 0.0

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The share of such rows."""
        lost = points["nonfinite_fraction"]
        return f"{100 * lost.value:.3g} % of the rows hold NaN or infinity, and {lost.n} are left to read"


@register_rule
class NonFiniteOrigin(Rule):
    """A module made the first NaN or infinity of a step, and the loss, the weights or their gradients hold some.

    It needs no baseline and no second point: what :class:`~lightning_collapse.FirstNonFinite` names was found by
    looking at every tensor of the step in the order of time. Where ``SkipStep`` leaves out updates that are not finite,
    only weights that are not finite themselves are a failure: all else is over with the step.

    Example:
        >>> values = {"cause": 3.0, "step": 7.0}
        >>> points = {name: Point("nonfinite", "encoder.2", name, 9, value) for name, value in values.items()}
        >>> NonFiniteOrigin().severity(points, {}) >= 1, NonFiniteOrigin().evidence(points, {})
        (True, 'overflow, at step 7')
    """

    kind = "non_finite_origin"
    says = "The first NaN or infinity comes from `{layer}`."
    family = "nonfinite"
    measures = ("cause",)
    optional = ("step", "left_out")
    lower_is_worse = ("left_out",)
    patience = 1
    advice = "Read the table that `FirstNonFinite` has written beside the logs; `Rollback()` goes back to before it."
    paper = "Micikevicius et al., 2018, arXiv 1710.03740"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Infinite where there is a cause, and, if updates are left out, it is an earlier update."""
        cause, left_out = points["cause"].value, "left_out" in points and points["left_out"].value >= 1
        return inf if (cause == Cause.UPDATE if left_out else cause >= 1) else 0.0

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The cause in words, and the step."""
        number, step = points["cause"].value, points.get("step")
        cause = Cause(int(number)) if number in list(Cause) else Cause.NONE
        words = {
            Cause.NONE: "of a cause that is not known",
            Cause.DATA: "the data hold it already",
            Cause.UPDATE: "an earlier update made its weights so",
            Cause.BACKWARD: "in the backward pass",
            Cause.UNSEEN: "in a step that was not looked at; `FirstNonFinite(replay=True)` repeats such a step at once",
        }.get(cause, cause.words)
        return words + (f", at step {step.value:.0f}" if step is not None and isfinite(step.value) else "")

    def onset(self, evidence: Evidence, since: int) -> int:
        """The step that the monitor names."""
        step = evidence.points.get("step")
        return int(step.value) if step is not None and 0 <= step.value <= since else since
