"""Inputs that fall onto one side of the weights they are multiplied by: a loss about to explode."""

from collections.abc import Mapping

from lightning_collapse.rules.base import ALL, Rule, register_rule
from lightning_collapse.utilities.points import Point


@register_rule
class LossExplosion(Rule):
    """The sign diversity of the spectral alignment collapses, in the mean over all matrices.

    It is half of the largest mean of the run's first twenty points, or less. Those are not judged themselves: inputs
    turn one-sided and back while the learning rate warms up. Nor are single matrices: their diversity touches zero in
    healthy training. The verdict names the matrix that lost the largest share of its own. That such a collapse precedes
    explosions is the finding of Qiu et al. (2025, arXiv 2510.04202); the mean and the numbers are ours.
    """

    kind = "loss_explosion"
    family = "spectral_alignment"
    measures = ("sign_diversity",)
    calibration = 20
    waits = True
    share = 0.5
    healthy = 2 / 3
    least = 0.1
    least_n = 32
    advice = "Return with `Rollback()`, which lowers the learning rate."
    paper = "Qiu et al., 2025, arXiv 2510.04202"

    def judges(self, layer: str) -> bool:
        """The mean over all matrices only."""
        return layer == ALL

    def severity(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> float:
        """Half of the beginning over the mean sign diversity; three quarters of the beginning are healthy again.

        Inputs that were one-sided from the beginning, as after a ReLU, have nothing to lose; the signs of a few rows
        fall to one side by chance.
        """
        if beginning["sign_diversity"] < self.least or points["sign_diversity"].n < self.least_n:
            return 0.0
        return self.share * beginning["sign_diversity"] / max(points["sign_diversity"].value, 1e-300)

    def evidence(self, points: Mapping[str, Point], beginning: Mapping[str, float]) -> str:
        """The mean, now and at the beginning."""
        diversity = points["sign_diversity"]
        return (
            f"the sign diversity of the inputs along the top singular vectors is {diversity.value:.2f} in the mean over"
            f" all matrices, where the run began with {beginning['sign_diversity']:.2f}"
        )

    def culprit(self, layers: Mapping[str, Mapping[str, Point]], beginnings: Mapping[str, Mapping[str, float]]) -> str:
        """The matrix that kept the smallest share of its own diversity."""
        kept = {
            layer: points["sign_diversity"].value / max(beginnings[layer]["sign_diversity"], 1e-300)
            for layer, points in layers.items()
            if layer != ALL
        }
        return min(kept, key=lambda layer: kept[layer], default=ALL)
