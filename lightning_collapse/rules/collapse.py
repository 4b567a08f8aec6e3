"""Collapse of a layer's features, of all rows onto one point or onto few directions."""

from collections.abc import Mapping
from math import isfinite

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Flag, Point


def decided_by_targets(layer: str, task: Task) -> bool:
    """Whether these are outputs that follow targets: a regression's may have any common mean, and so may logits."""
    return layer in task.outputs and task.name in ("classification", "regression", "language model")


@register_rule
class CompleteCollapse(Rule):
    """All rows are equal, or as good as.

    Their spread is a hundredth of the features' root mean square; or it is a tenth of it, and a quarter of what it was
    at the beginning of the run. Or the standard deviation of the features is a hundredth of that at the beginning.
    Ranks cannot see this: they do not change when a representation shrinks. Rows that point one way are equal to every
    loss of the cosine, such as those of BYOL and SimSiam: the same lines hold for the spread of the directions. The
    outputs of a classifier, a regression or a language model are not judged, nor are single features.
    """

    kind = "complete_collapse"
    family = "collapse"
    measures = ("feature_std", "relative_spread")
    optional = ("direction_spread",)
    share = 0.01
    deep = 0.1
    share_of_beginning = 0.25
    supersedes = ("dimensional_collapse",)
    advice = "Add `Regularizer(VICReg(), on=...)`, or `VCReg()` for one view, or have `SwitchOn` raise its weight."
    paper = "Bardes, Ponce & LeCun, 2022, arXiv 2105.04906; Chen & He, 2021, arXiv 2011.10566"

    def judges(self, layer: str, task: Task) -> bool:
        """Every layer but outputs that follow targets."""
        return super().judges(layer, task) and not decided_by_targets(layer, task)

    def severity(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> float:
        """How far the least of the shares is below its line."""
        if points["feature_std"].flag == Flag.CONSTANT:
            return float("inf")
        spreads = self._spreads(points)
        shrunk = points["feature_std"].value / max(beginning["feature_std"], 1e-300)
        lines = [
            max(self.share, min(self.deep, self.share_of_beginning * beginning[name])) / max(value, 1e-300)
            for name, value in spreads.items()
        ]
        return max(self.share / max(shrunk, 1e-300), *lines) if lines else 0.0

    def evidence(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> str:
        """All shares, and the beginning."""
        std, spread = (points[name] for name in self.measures)
        directions = (
            f", that of the directions {100 * points[name].value:.2g} % ({100 * beginning[name]:.2g} %)"
            for name in self.optional
            if name in self._spreads(points)
        )
        return (
            f"over {std.n} rows the feature std is {std.value:.2g}, where the run began with"
            f" {beginning['feature_std']:.2g}; the spread is {100 * spread.value:.2g} % of the root mean square"
            f" (began with {100 * beginning['relative_spread']:.2g} %){''.join(directions)}"
        )

    def expected(self, layer: str, points: Mapping[str, Point], beginning: Mapping[str, float], task: Task) -> str:
        """News in language models, whose features lie in a narrow cone, down to the lines of a hundredth."""
        total = any(value <= self.share for value in self._spreads(points).values())
        shrunk = points["feature_std"].value <= self.share * beginning["feature_std"]
        if task.name != "language model" or total or shrunk:
            return ""
        return "features of language models lie in a narrow cone (Ethayarajh, 2019), and this is no failure"

    def _spreads(self, points: Mapping[str, Point]) -> dict[str, float]:
        """What there is to judge; nothing for a single feature, whose direction has no null: it is a sign."""
        found = {name: points[name] for name in ("relative_spread", "direction_spread") if name in points}
        if "direction_spread" in found and not found["direction_spread"].null > 0:
            return {}
        return {name: point.value for name, point in found.items() if isfinite(point.value)}


@register_rule
class DimensionalCollapse(Rule):
    """Few directions are left.

    Both effective ranks are near one; or the one of eigenvalues is a tenth of what it was at the beginning of the run
    and the one of singular values three tenths. Both, since either alone misleads: the one of eigenvalues is near one
    wherever one direction is loud (a healthy binary classifier) and falls at the start of healthy runs, the one of
    singular values is lifted by rounding noise. Layers where noise itself reads a handful are not judged: there is
    too little to lose. Nor are the outputs of a classifier, a regression or a language model.
    """

    kind = "dimensional_collapse"
    family = "collapse"
    measures = ("eigenvalue_effective_rank", "effective_rank")
    lines = (1.25, 2.0)
    shares = (0.1, 0.3)
    least_null = 6.0
    advice = "Add `Regularizer(VICReg(), on=...)`, or `EffectiveRankHinge()` or `VCReg()` for one view."
    paper = "Jing et al., 2022, arXiv 2110.09348"

    def judges(self, layer: str, task: Task) -> bool:
        """Every layer but outputs that follow targets."""
        return super().judges(layer, task) and not decided_by_targets(layer, task)

    def severity(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> float:
        """How far both ranks are below their lines, or below their shares of the beginning."""
        ranks = [points[name] for name in self.measures]
        if not ranks[0].null > self.least_null or ranks[0].flag == Flag.CONSTANT:
            return 0.0
        # a rank counts from one: at twice a line's distance from it all is well
        near_one = min((line - 1) / max(rank.value - 1, 1e-300) for line, rank in zip(self.lines, ranks, strict=True))
        lost = min(
            share * beginning[name] / max(rank.value, 1e-300)
            for share, name, rank in zip(self.shares, self.measures, ranks, strict=True)
        )
        return max(near_one, lost)

    def evidence(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> str:
        """Both ranks, the null and the beginning."""
        rank, wide = (points[name] for name in self.measures)
        return (
            f"over {rank.n} rows the eigenvalue effective rank is {rank.value:.2f} and the effective rank"
            f" {wide.value:.1f}, where isotropic noise reads {rank.null:.0f} and {wide.null:.0f} and the run began with"
            f" {beginning[self.measures[0]]:.1f} and {beginning[self.measures[1]]:.1f}"
        )

    def expected(self, layer: str, points: Mapping[str, Point], beginning: Mapping[str, float], task: Task) -> str:
        """News in the last features of a classifier or a regression that are nearer to their end than to a line.

        Neural collapse leaves ``C - 1`` directions of ``C`` classes, regression as many as it has targets, so that a
        binary classifier rightly ends on a line. The rank of eigenvalues must be above half of the way from one to it.
        """
        rank = points[self.measures[0]].value
        if layer not in task.last or not task.directions or rank < (1 + task.directions) / 2 - 0.01:
            return ""
        return f"{task.name} ends in {task.directions} direction(s) there, and this is no failure"
