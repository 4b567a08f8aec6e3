"""Collapse of a layer's features, of all rows onto one point or onto few directions."""

from collections.abc import Mapping

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Flag, Point


@register_rule
class CompleteCollapse(Rule):
    """All rows are equal, or as good as.

    The spread is a hundredth of the features' root mean square, or a hundredth of what it was at the beginning of the
    run. Ranks cannot see this: they do not change when a representation shrinks.
    """

    kind = "complete_collapse"
    family = "collapse"
    measures = ("feature_std", "relative_spread")
    share = 0.01
    supersedes = ("dimensional_collapse",)
    advice = "Add `Regularizer(VICReg(), on=...)`, or `VCReg()` for one view, or have `SwitchOn` raise its weight."
    paper = "Bardes, Ponce & LeCun, 2022, arXiv 2105.04906"

    def severity(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> float:
        """A hundredth over the smaller of the two shares."""
        if points["feature_std"].flag == Flag.CONSTANT:
            return float("inf")
        shrunk = points["feature_std"].value / max(beginning["feature_std"], 1e-300)
        return self.share / max(min(shrunk, points["relative_spread"].value), 1e-300)

    def evidence(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> str:
        """The two shares."""
        std, spread = points["feature_std"], points["relative_spread"]
        return (
            f"over {std.n} rows the feature std is {std.value:.2g}, where the run began with"
            f" {beginning['feature_std']:.2g}; the spread is {100 * spread.value:.2g} % of the root mean square"
        )


@register_rule
class DimensionalCollapse(Rule):
    """Few directions are left.

    Both effective ranks are near one; or the one of eigenvalues is a tenth of what it was at the beginning of the run
    and the one of singular values three tenths. Both, since either alone misleads: the one of eigenvalues is near one
    wherever one direction is loud (a healthy binary classifier) and falls at the start of healthy runs, the one of
    singular values is lifted by rounding noise. Layers where noise itself reads a handful are not judged: there is
    too little to lose.
    """

    kind = "dimensional_collapse"
    family = "collapse"
    measures = ("eigenvalue_effective_rank", "effective_rank")
    lines = (1.25, 2.0)
    shares = (0.1, 0.3)
    least_null = 6.0
    advice = "Add `Regularizer(VICReg(), on=...)`, or `EffectiveRankHinge()` or `VCReg()` for one view."
    paper = "Jing et al., 2022, arXiv 2110.09348"

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

    def expected(self, layer: str, points: Mapping[str, Point], task: Task) -> str:
        """News in the last features of a classifier or a regression that are nearer to their end than to a line.

        Neural collapse leaves ``C - 1`` directions of ``C`` classes, regression as many as it has targets, so that a
        binary classifier rightly ends on a line. The rank of eigenvalues must be above half of the way from one to it.
        """
        rank = points[self.measures[0]].value
        if layer not in task.last or not task.directions or rank < (1 + task.directions) / 2 - 0.01:
            return ""
        return f"{task.name} ends in {task.directions} direction(s) there, and this is no failure"
