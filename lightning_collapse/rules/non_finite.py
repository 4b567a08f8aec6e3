"""Non-finite features: rows that hold NaN or infinity."""

from collections.abc import Mapping
from math import inf, isnan

from lightning_collapse.rules.base import Rule, register_rule
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
