"""Neural collapse and minority collapse of a classifier: all classes on a simplex, or the rare ones on each other."""

from collections.abc import Mapping
from math import isfinite

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.utilities.points import Point


@register_rule
class NeuralCollapseReached(Rule):
    """The features have folded onto their class means, and these onto a simplex that the classifier matches.

    No failure: in classification that is where training ends, and helps (Papyan, Han & Donoho, 2020, arXiv 2008.08186).
    The paper states no numbers; ours are the magnitudes of its late epochs. NC1 is a hundredth or less, a hundredth of
    what features without any class structure would read from as many rows, and a tenth of the baseline: data that are
    well separated from the start have not collapsed. The lengths of the class means vary by a fifth of their mean, and
    NC3 is a fifth or less. Points of fewer than ten rows per class are not judged: those fold by themselves,
    and that is all the number of classes is read for.

    Example:
        >>> values = {"nc1": 0.001, "nc2_equinorm": 0.01, "nc3": 0.01, "classes": 10.0}
        >>> points = {name: Point("neural_collapse", "head", name, 9, value, n=256) for name, value in values.items()}
        >>> NeuralCollapseReached().severity(points, {"nc1": 5.0}) > 1
        True
    """

    kind = "neural_collapse_reached"
    says = "The features of every class have folded onto one point in `{layer}`."
    family = "neural_collapse"
    measures = ("nc1", "nc2_equinorm", "nc3", "classes")
    lower_is_worse = ("nc1", "nc2_equinorm", "nc3")
    informative = True
    line = 0.01
    share_of_null = 0.01
    share_of_baseline = 0.1
    frame = 0.2
    rows_per_class = 10
    tasks = ("classification", "language model")
    paper = "Papyan, Han & Donoho, 2020, arXiv 2008.08186"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """How far the least collapsed of NC1, NC2 and NC3 is below its line."""
        nc1, equinorm, nc3, classes = (points[name] for name in self.measures)
        if nc1.n < self.rows_per_class * classes.value:
            return 0.0
        lines = [self.line, self.share_of_baseline * baseline["nc1"]]
        if isfinite(nc1.null):
            lines.append(self.share_of_null * nc1.null)
        shares = [min(lines) / max(nc1.value, 1e-300)]
        shares += [self.frame / max(point.value, 1e-300) for point in (equinorm, nc3)]
        return min(shares)

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """NC1 to NC3, the null of NC1 and its baseline."""
        nc1, equinorm, nc3, classes = (points[name] for name in self.measures)
        null = f"no class structure would read {nc1.null:.2g} and " if isfinite(nc1.null) else ""
        return (
            f"over {nc1.n} rows of {classes.value:.0f} classes NC1 is {nc1.value:.2g}, where {null}the run began with"
            f" {baseline['nc1']:.2g}; the class means' lengths vary by {100 * equinorm.value:.2g} %, and NC3 is"
            f" {nc3.value:.2g}; in classification this is no failure"
        )


@register_rule
class MinorityCollapse(Rule):
    """The classifier cannot tell the rare classes apart: their rows are parallel, or have vanished.

    That the cosine between them tends to one as the imbalance grows is the finding of Fang et al. (2021, arXiv
    2101.12699), that they may vanish follows from Dang et al. (2023, arXiv 2301.00437); the lines are ours: a mean
    cosine of seven tenths, or a length of a fiftieth of that of the other classes, which imbalance alone brings only at
    one to several million. Not judged before the baseline is complete: in few dimensions the rows of a fresh
    classifier may be parallel by chance. Balanced classes have no minority, and points of theirs are not judged.

    Example:
        >>> values = {"minority_cosine": 0.99, "minority_norm": 0.1}
        >>> points = {name: Point("neural_collapse", "head", name, 9, value, n=256) for name, value in values.items()}
        >>> baseline = {"minority_cosine": 0.0, "minority_norm": 1.0}
        >>> MinorityCollapse().severity(points, baseline) > 1
        True
    """

    kind = "minority_collapse"
    says = "The rare classes can hardly be told apart in `{layer}`."
    family = "neural_collapse"
    measures = ("minority_cosine", "minority_norm")
    lower_is_worse = ("minority_norm",)
    higher_is_worse = ("minority_cosine",)
    needs_full_baseline = True
    healthy = 0.75
    distance = 0.3
    length = 0.02
    tasks = ("classification",)
    advice = "Use an `ETFClassifier` with `DotRegression`, or the losses `BalancedSoftmax` or `LongTailCollapse`."
    paper = "Fang et al., 2021, arXiv 2101.12699"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Three tenths over the distance of the cosine from one, or a fiftieth over the relative length."""
        cosine, length = (points[name].value for name in self.measures)
        return max(self.distance / max(1 - cosine, 1e-300), self.length / max(length, 1e-300))

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Both, and the baseline of the cosine."""
        cosine, length = (points[name] for name in self.measures)
        return (
            f"the classifier's rows of the rare classes have a mean cosine of {cosine.value:.2f}, where the run began"
            f" with {baseline['minority_cosine']:.2f}, and {length.value:.2g} times the length of the others"
        )
