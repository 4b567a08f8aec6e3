"""Complete and dimensional collapse: a layer's rows on one point, or along few directions."""

from collections.abc import Mapping

from lightning_collapse.rules.base import UNDECIDED, Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import (
    LOSS,
    PROGRESS,
    RECALL,
    begins,
    falls_slowly,
    learns,
    learns_in_turn,
    may_begin,
    thrives,
)
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Flag, Point

SHARE, DEEP, SHARE_OF_BASELINE = 0.01, 0.1, 0.25
"""All there is to a spread is lost below the first; below the second, if it is this share of the baseline."""
SHARE_FROM_BIRTH = 0.001
"""The first, of a layer that was below the second at the beginning, while the network learns or once it has learned."""
BORN_SO = (
    "It was so at the first point: look at the initialization, and add normalization or skip connections;"
    " `VariancePropagationMonitor()` shows where the signal is lost."
)
DIVERGES = (
    "The loss is worse than that of the untrained network: return with `Rollback()`, which lowers the learning rate."
)
LENGTHS = 0.25
"""Lengths that vary by more tell rows apart."""
RANK_LINES, LEAST_NULL, NEARER = (1.25, 2.0), 6.0, 3.0
"""Ranks of eigenvalues and singular values that are near one, where noise itself reads more than the second; a rank
that began near one must be this many times as near."""


def directions_gone(points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
    """How far the spread of the directions is below its lines, 0 where nothing is known of it.

    That of a single feature is no spread but a sign, and has no null.
    """
    if "direction_spread" not in baseline or not points["direction_spread"].null > 0:
        return 0.0
    return spread_gone(points["direction_spread"].value, baseline["direction_spread"])


def spread_gone(value: float, baseline: float) -> float:
    """A hundredth over a spread; or a tenth, or a quarter of the baseline if that is less, or even its square."""
    return max(SHARE, min(DEEP, SHARE_OF_BASELINE * baseline, baseline * baseline)) / max(value, 1e-300)


def on_a_ray(points: Mapping[str, Point]) -> bool:
    """Whether rows lie on one line and differ in their lengths: one direction is left, and something to tell."""
    if not {"eigenvalue_effective_rank", "relative_spread"} <= points.keys():
        return False
    rank, spread = points["eigenvalue_effective_rank"], points["relative_spread"]
    return rank.null > LEAST_NULL and rank.value <= RANK_LINES[0] and spread.value > LENGTHS


@register_rule
class CompleteCollapse(Rule):
    """All rows are equal, or as good as.

    Their spread is a hundredth of the features' root mean square; or it is a tenth of it, and a quarter of what it was
    at the beginning of the run, or the square of that where it was narrow then. Or the standard deviation of the
    features is a hundredth of that at the beginning. Before the eighth point, of a joint embedding the sixteenth,
    and while the network learns, a tenth is not enough, nor is anything above a thousandth where rows were within a
    tenth of each other at the beginning: healthy layers fall as low for a while, and codebooks begin with one code.
    It learns while the loss falls, and a joint embedding, whose loss falls as it collapses, while one view finds
    the other better and better. Where rows were that near from birth, as patches of one gray are, it is enough that
    the loss has halved and keeps that. Nor is anything said of the last layers of a classifier or a language model
    that has not begun to learn more than frequencies, nor of an autoencoder that has one code, or one mean of all
    inputs, for seven tenths of the run or 64 points: healthy ones lie on such a plateau, and leave it all at once.

    Ranks cannot see this: they do not change when a representation shrinks. Rows that point one way are equal to
    every loss of the cosine, such as those of BYOL and SimSiam: the same lines hold for the spread of the
    directions, unless rows lie on a ray, which is dimensional collapse: so the rank, which tells the two apart, has
    no direction in which it is worse. Where the loss sees lengths, in classifiers, language models and
    autoencoders, features that spread more than at the beginning, beside a mean that grows faster, lie in a cone
    and not on a point. Outputs that the loss compares with targets are not judged, nor is what holds little by
    design, such as the embedding of a time, nor are single features.

    Example:
        >>> values = {"feature_std": 0.01, "relative_spread": 0.02}
        >>> points = {name: Point("collapse", "encoder", name, 9, value, n=256) for name, value in values.items()}
        >>> baseline = {"feature_std": 1.0, "relative_spread": 0.6}
        >>> CompleteCollapse().severity(points, baseline) > 1
        True
    """

    kind = "complete_collapse"
    says = "All inputs are mapped to nearly one point in `{layer}`."
    family = "collapse"
    measures = ("feature_std", "relative_spread")
    optional = ("direction_spread", "eigenvalue_effective_rank")
    follows = (LOSS, RECALL)
    lower_is_worse = ("feature_std", "relative_spread", "direction_spread")
    supersedes = ("dimensional_collapse",)
    advice = "Add `Regularizer(VICReg(), layer=...)`, or `VCReg()` for one view, or have `SwitchOn` raise its weight."
    paper = "Bardes, Ponce & LeCun, 2022, arXiv 2105.04906; Chen & He, 2021, arXiv 2011.10566"

    def applies_to(self, layer: str, task: Task) -> bool:
        """Every layer but outputs that follow targets, and those that hold little by design."""
        return super().applies_to(layer, task) and layer not in task.outputs and layer not in task.conditioning

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """How far the least of the shares is below its line."""
        if points["feature_std"].flag == Flag.CONSTANT:
            return float("inf")
        if "direction_spread" in points and not points["direction_spread"].null > 0:
            return 0.0
        alike = spread_gone(points["relative_spread"].value, baseline["relative_spread"])
        directions = directions_gone(points, baseline)
        alike = max(alike, min(directions, UNDECIDED) if on_a_ray(points) else directions)
        return max(_shrunk(points, baseline), alike)

    def weigh(self, evidence: Evidence) -> float:
        """The severity; of a network that goes on learning only a hundredth counts, from birth only a thousandth."""
        points, severity = evidence.points, self.severity(evidence.points, evidence.baseline)
        equal = points["feature_std"].flag == Flag.CONSTANT
        if may_begin(evidence) and (not equal or evidence.task.name == "reconstruction"):
            return min(severity, UNDECIDED)
        if equal:
            return severity
        sees_lengths = learns_in_turn(evidence) or evidence.task.name == "reconstruction"
        cone = sees_lengths and points["feature_std"].value > evidence.baseline["feature_std"]
        names = ("relative_spread",) if cone or on_a_ray(points) else ("relative_spread", "direction_spread")
        narrow = min(evidence.baseline[name] for name in names if name in evidence.baseline) < DEEP
        if not (cone or learns(evidence) or (narrow and thrives(evidence))):
            return severity
        spreads = [points[name].value for name in names if name in points]
        line = SHARE_FROM_BIRTH if narrow else SHARE
        total = max(_shrunk(points, evidence.baseline), *(line / max(spread, 1e-300) for spread in spreads))
        return severity if total >= 1 else min(severity, UNDECIDED)

    def describe(self, evidence: Evidence, layer: str) -> str:
        """Whether rows are equal, or point one way and differ in their lengths."""
        points, baseline = evidence.points, evidence.baseline
        equal = spread_gone(points["relative_spread"].value, baseline["relative_spread"])
        one_way = max(equal, _shrunk(points, baseline)) < 1 <= directions_gone(points, baseline)
        return f"All inputs point nearly one way in `{layer}`." if one_way else self.sentence(layer)

    def advise(self, evidence: Evidence) -> str:
        """What to do of a layer that was so from birth, or of a training that diverges; else its own advice."""
        spreads = [
            evidence.baseline[name] for name in ("relative_spread", "direction_spread") if name in evidence.baseline
        ]
        return _advice(evidence, min(spreads) < DEEP) or self.advice

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """All shares, and the baseline."""
        std, spread = (points[name] for name in self.measures)
        return (
            f"over {std.n} rows the feature std is {std.value:.2g}, where the run began with"
            f" {baseline['feature_std']:.2g}; the spread is {100 * spread.value:.2g} % of the root mean square"
            f" (began with {100 * baseline['relative_spread']:.2g} %){_of_directions(points, baseline)}"
        )

    def expected(self, layer: str, points: Mapping[str, Point], baseline: Mapping[str, float], task: Task) -> str:
        """News in language models, whose features lie in a narrow cone, down to the lines of a hundredth."""
        total = any(points[name].value <= SHARE for name in ("relative_spread", "direction_spread") if name in baseline)
        shrunk = points["feature_std"].value <= SHARE * baseline["feature_std"]
        if task.name != "language model" or total or shrunk:
            return ""
        return "features of language models lie in a narrow cone (Ethayarajh, 2019), and this is no failure"


@register_rule
class DimensionalCollapse(Rule):
    """Few directions are left.

    Both effective ranks are near one, and three times as near as at the beginning of the run, or as good as one; or the
    one of eigenvalues is a tenth of what it was at the beginning and the one of singular values three tenths. Both,
    since either alone misleads: the one of eigenvalues is near one wherever one direction is loud (a healthy binary
    classifier) and falls at the start of healthy runs, the one of singular values is lifted by rounding noise.
    Where two views are seen a fall is left to :class:`PartialCollapse`, since healthy joint embeddings fall as low
    and recover. Nor is anything said of a classifier or a language model while its loss falls, however slowly: it
    learns the loudest difference first, and the others after it; nor of its last layers on its first plateau, see
    :class:`CompleteCollapse`, and nothing of a fall to few directions in any layer; nor of what held one direction
    from birth, as patches of one number do, while the loss falls, or once it has halved and keeps that. Or all rows
    lie on a ray: one direction by the lines of :class:`CompleteCollapse`, and lengths that vary by more than a
    quarter. Layers where noise itself reads a handful are not judged: there is too little to lose. Nor are the
    outputs that the loss compares with targets, nor what holds little by design, such as the embedding of a time.

    Example:
        >>> points = {
        ...     name: Point("collapse", "encoder", name, 9, 1.2, n=256, null=30.0)
        ...     for name in ("eigenvalue_effective_rank", "effective_rank")
        ... }
        >>> baseline = {"eigenvalue_effective_rank": 12.0, "effective_rank": 20.0}
        >>> DimensionalCollapse().severity(points, baseline) > 1
        True
    """

    kind = "dimensional_collapse"
    says = "Only few directions are left of the features in `{layer}`."
    family = "collapse"
    measures = ("eigenvalue_effective_rank", "effective_rank")
    optional = ("relative_spread", "direction_spread")
    follows = (RECALL, LOSS)
    lower_is_worse = ("eigenvalue_effective_rank", "effective_rank", "direction_spread")
    higher_is_worse = ("relative_spread",)
    shares = (0.1, 0.3)
    advice = "Add `Regularizer(VICReg(), layer=...)`, or `EffectiveRankHinge()` or `VCReg()` for one view."
    paper = "Jing et al., 2022, arXiv 2110.09348"

    def applies_to(self, layer: str, task: Task) -> bool:
        """Every layer but outputs that follow targets, and those that hold little by design."""
        return super().applies_to(layer, task) and layer not in task.outputs and layer not in task.conditioning

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """How far both ranks are below their lines, or below their shares of the baseline; or how near to a ray."""
        return max(self._few(points, baseline), self._lost(points, baseline))

    def weigh(self, evidence: Evidence) -> float:
        """The severity; a fall is left to :class:`PartialCollapse` where there are views, and birth is no failure."""
        if may_begin(evidence) or begins(evidence) or (learns_in_turn(evidence) and falls_slowly(evidence)):
            return min(self.severity(evidence.points, evidence.baseline), UNDECIDED)
        few, lost = self._few(evidence.points, evidence.baseline), self._lost(evidence.points, evidence.baseline)
        if evidence.baseline[self.measures[0]] <= RANK_LINES[0] and (learns(evidence) or thrives(evidence)):
            few = min(few, UNDECIDED)  # as narrow from birth, as patches of one gray are, and no harm to learning
        left = RECALL in evidence.history or may_begin(evidence, anywhere=True)
        return max(few, min(lost, UNDECIDED) if left else lost)

    def _few(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """How near both ranks are to one, or the rows to a ray."""
        ranks = [points[name] for name in self.measures]
        if not ranks[0].null > LEAST_NULL or ranks[0].flag == Flag.CONSTANT:
            return 0.0
        # a rank counts from one: at twice a line's distance from it all is well
        near_one = min(
            _rank_line(line, baseline[rank_name]) / max(rank.value - 1, 1e-300)
            for line, rank_name, rank in zip(RANK_LINES, self.measures, ranks, strict=True)
        )
        directions = directions_gone(points, baseline)
        return max(near_one, directions if on_a_ray(points) else min(directions, UNDECIDED))

    def _lost(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """How far both ranks are below their shares of the baseline."""
        ranks = [points[name] for name in self.measures]
        if not ranks[0].null > LEAST_NULL or ranks[0].flag == Flag.CONSTANT:
            return 0.0
        return min(
            share * baseline[name] / max(rank.value, 1e-300)
            for share, name, rank in zip(self.shares, self.measures, ranks, strict=True)
        )

    def advise(self, evidence: Evidence) -> str:
        """What to do of a layer that was so from birth, or of a training that diverges; else its own advice."""
        return _advice(evidence, evidence.baseline[self.measures[0]] <= RANK_LINES[0]) or self.advice

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Both ranks, the null and the baseline; and the directions."""
        rank, wide = (points[name] for name in self.measures)
        return (
            f"over {rank.n} rows the eigenvalue effective rank is {rank.value:.2f} and the effective rank"
            f" {wide.value:.1f}, where isotropic noise reads {rank.null:.0f} and {wide.null:.0f} and the run began with"
            f" {baseline[self.measures[0]]:.1f} and {baseline[self.measures[1]]:.1f}"
            f"{_of_directions(points, baseline)}"
        )

    def expected(self, layer: str, points: Mapping[str, Point], baseline: Mapping[str, float], task: Task) -> str:
        """News in the last features of a classifier or a regression that are nearer to their end than to a line.

        Neural collapse leaves ``C - 1`` directions of ``C`` classes, regression as many as it has targets, so that a
        binary classifier rightly ends on a line. The rank of eigenvalues must be above half of the way from one to it.
        """
        rank = points[self.measures[0]].value
        if layer not in task.last or not task.directions or rank < (1 + task.directions) / 2 - 0.01:
            return ""
        return f"{task.name} ends in {task.directions} direction(s) there, and this is no failure"


def _advice(evidence: Evidence, from_birth: bool) -> str:
    """What no loss on the features mends: a network that begins so, and one whose loss is worse than untrained."""
    loss = evidence.history.get(LOSS)
    if from_birth:
        return BORN_SO
    worse = loss is not None and loss.level > loss.first + PROGRESS * abs(loss.first)
    return DIVERGES if worse and evidence.task.name not in ("", "self-supervised") else ""


def _shrunk(points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
    """A hundredth of the beginning over the standard deviation."""
    return SHARE * baseline["feature_std"] / max(points["feature_std"].value, 1e-300)


def _rank_line(line: float, baseline: float) -> float:
    """How far from one a rank may be: less where it began near one, as in a first layer of gray images."""
    return max(min(line - 1, (baseline - 1) / NEARER), (line - 1) / 10)


def _of_directions(points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
    if "direction_spread" not in baseline:
        return ""
    now, before = 100 * points["direction_spread"].value, 100 * baseline["direction_spread"]
    return f"; the spread of the directions is {now:.2g} % (began with {before:.2g} %)"
