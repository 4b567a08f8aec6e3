"""Over-compression in regression: features have a lower intrinsic dimension than the targets."""

from collections.abc import Mapping
from math import log, nan, sqrt

from lightning_collapse.rules.base import UNDECIDED, Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import LOSS, SURE, UNHARMED, is_harmed
from lightning_collapse.utilities.points import Point


@register_rule
class RegressionOverCompression(Rule):
    """The features of a regression head have a lower intrinsic dimension than the targets they are to predict.

    That such models generalize worse, and those with more dimensions than the targets do not, is the finding of a study
    of which we could read the abstract only (2025, arXiv 2510.01105). How much lower is ours: three standard errors of
    both estimates together, but a tenth at least, since both are too low by some percent near the boundary of the data.
    Neural collapse as such, which leaves as many dimensions as there are targets, is no failure here. Not judged are
    points whose targets repeat: either the window is longer than an epoch, so that the nearest neighbor of a sample is
    its own copy of some steps ago and the estimate far too low, or the targets are too discrete to have a dimension.
    Nothing is said before the eighth point. Noise in the targets has dimensions of its own, which no feature can have:
    as long as the loss has kept nine tenths of what it gained it is a notice.

    Example:
        >>> values = {"intrinsic_dimension": 1.0, "target_dimension": 3.0}
        >>> points = {name: Point("regression_collapse", "", name, 9, value, n=256) for name, value in values.items()}
        >>> baseline = {"intrinsic_dimension": 6.0, "target_dimension": 3.0}
        >>> RegressionOverCompression().severity(points, baseline) > 1
        True
    """

    kind = "regression_over_compression"
    says = "The features have fewer dimensions than the targets in `{layer}`."
    family = "regression_collapse"
    measures = ("intrinsic_dimension", "target_dimension")
    lower_is_worse = ("intrinsic_dimension",)
    higher_is_worse = ("target_dimension",)
    errors = 3.0
    least = 0.1
    distinct = 0.9
    tasks = ("regression",)
    follows = ("intrinsic_dimension", LOSS)
    advice = "Lower the weight decay, or add `Regularizer(EffectiveRankHinge(), layer=...)` to the layer."
    paper = "2025, arXiv 2510.01105"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The logarithm of the targets' dimension over the features', in units of what counts as a difference.

        NaN unless nine in ten targets differ.
        """
        features, targets = (points[name] for name in self.measures)
        if targets.n < self.distinct * features.n:
            return nan
        if min(features.n, targets.n) < 1 or not (features.value > 0 and targets.value > 0):
            return 0.0
        error = self.errors * sqrt(1 / features.n + 1 / targets.n)
        return max(log(targets.value / features.value) / max(error, self.least), 0.0)

    def weigh(self, evidence: Evidence) -> float:
        """The severity; undecided before the eighth point, since fresh networks have a few dimensions only."""
        severity, curve = self.severity(evidence.points, evidence.baseline), evidence.history.get("intrinsic_dimension")
        return min(severity, UNDECIDED) if curve is None or curve.count < SURE else severity

    def excuse(self, evidence: Evidence) -> str:
        """That the loss has come to no harm."""
        return "" if is_harmed(evidence) else UNHARMED

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Both dimensions, and the features' baseline."""
        features, targets = (points[name] for name in self.measures)
        return (
            f"over {features.n} rows the intrinsic dimension of the features is {features.value:.2g}, below the"
            f" {targets.value:.2g} of the targets; the run began with {baseline['intrinsic_dimension']:.2g}"
        )
