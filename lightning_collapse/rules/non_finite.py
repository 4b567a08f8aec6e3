"""Features that are no numbers any more."""

from collections.abc import Mapping
from math import inf, isnan

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.utilities.points import Point


@register_rule
class NonFinite(Rule):
    """Rows of features hold NaN or infinity.

    Every other rule leaves such rows out, and reads nothing where all are such. It compares with no beginning: one such
    row is one too many, though not one point of them, since 16-bit training overflows and steps back.
    """

    kind = "non_finite"
    family = "collapse"
    measures = ("nonfinite_fraction",)
    advice = "Return with `Rollback()`, which lowers the learning rate."
    paper = "Micikevicius et al., 2018, arXiv 1710.03740"

    def readable(self, points: Mapping[str, Point]) -> bool:
        """Also where no row is left to read."""
        return "nonfinite_fraction" in points and not isnan(points["nonfinite_fraction"].value)

    def severity(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> float:
        """Infinite if there is such a row."""
        return inf if points["nonfinite_fraction"].value > 0 else 0.0

    def evidence(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> str:
        """The share of such rows."""
        lost = points["nonfinite_fraction"]
        return f"{100 * lost.value:.3g} % of the rows hold NaN or infinity, and {lost.n} are left to read"
