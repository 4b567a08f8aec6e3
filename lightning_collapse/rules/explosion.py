"""Loss explosion: inputs fall onto one side of the weights they are multiplied by, and a matrix grows."""

from collections.abc import Mapping

from lightning_collapse.rules.base import ALL, Rule, register_rule
from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.growth import Growth
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Point


@register_rule
class LossExplosion(Rule):
    """The sign diversity of the spectral alignment collapses, in the mean over all matrices, while a matrix grows.

    The mean is half of the largest of the run's first twenty points, or less, and the largest spectral norm of all
    matrices twice the largest of those points, or more. The first twenty are not judged themselves: inputs turn
    one-sided and back, and norms grow, while the learning rate warms up. Nor are single matrices: their diversity
    touches zero in healthy training. Nor is one-sidedness alone: small networks turn one-sided and stay well as long as
    no matrix grows. Both together are enough at one point: from there to NaN there may be few. Or the largest norm
    begins to grow faster than it did, by a detector with a budget of one false alarm in a hundred runs, while the loss
    rises, by another that is halfway to its alarm. The verdict names the
    matrix that lost the largest share of its own diversity. That such a collapse precedes explosions is the finding of
    Qiu et al. (2025, arXiv 2510.04202), that spectral norms grow with it of Qiu & Yao (2025, arXiv 2510.04212); the
    mean and the numbers are ours.

    Example:
        >>> values = {"sign_diversity": 0.02, "spectral_norm": 9.0}
        >>> points = {name: Point("spectral_alignment", "all", name, 9, value, n=256) for name, value in values.items()}
        >>> baseline = {"sign_diversity": 0.7, "spectral_norm": 2.0}
        >>> LossExplosion().severity(points, baseline) > 1
        True
    """

    kind = "loss_explosion"
    says = "The loss is about to explode: inputs turn one-sided as weights grow, first in `{layer}`."
    family = "spectral_alignment"
    measures = ("sign_diversity", "spectral_norm")
    of_training = ("loss",)
    lower_is_worse = ("sign_diversity",)
    higher_is_worse = ("spectral_norm",)
    calibration = 20
    needs_full_baseline = True
    patience = 1
    recovery = 2
    share = 0.5
    growth = 2.0
    healthy = 2 / 3
    least = 0.1
    least_n = 32
    advice = "Return with `Rollback()`, which lowers the learning rate."
    paper = "Qiu et al., 2025, arXiv 2510.04202"

    def applies_to(self, layer: str, task: Task) -> bool:
        """The mean over all matrices only."""
        return layer == ALL

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Half of the baseline over the mean sign diversity, or half of the growth if that is less.

        At three quarters of the baseline all is healthy again. Inputs that were one-sided from the beginning, as after
        a ReLU, have nothing to lose; the signs of a few rows fall to one side by chance.
        """
        diversity, norm = (points[name] for name in self.measures)
        if baseline["sign_diversity"] < self.least or diversity.n < self.least_n:
            return 0.0
        lost = self.share * baseline["sign_diversity"] / max(diversity.value, 1e-300)
        return min(lost, norm.value / max(baseline["spectral_norm"], 1e-300) / self.growth)

    def detectors(self, layer: str, planned: int | None) -> Mapping[str, Detector]:
        """Of the growth of the largest norm, and of the loss."""
        return {"spectral_norm": Growth(planned), "loss": Detector(planned)} if layer == ALL else {}

    def weigh(self, evidence: Evidence) -> float:
        """The severity, or how sure both detectors are if that is more."""
        norm, loss = (evidence.detectors[name].statistic for name in ("spectral_norm", "loss"))
        return max(self.severity(evidence.points, evidence.baseline), min(norm, 2 * loss))

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Mean and norm, and their baselines."""
        diversity, norm = (points[name] for name in self.measures)
        return (
            f"the sign diversity of the inputs along the top singular vectors is {diversity.value:.2f} in the mean over"
            f" all matrices, where the run began with {baseline['sign_diversity']:.2f}, and the largest spectral norm"
            f" of a matrix {norm.value:.3g}, where it began with {baseline['spectral_norm']:.3g}"
        )

    def worst_layer(
        self, layers: Mapping[str, Mapping[str, Point]], baselines: Mapping[str, Mapping[str, float]]
    ) -> str:
        """The matrix that kept the smallest share of its own diversity."""
        kept = {
            layer: points["sign_diversity"].value / max(baselines[layer]["sign_diversity"], 1e-300)
            for layer, points in layers.items()
            if layer != ALL
        }
        return min(kept, key=lambda layer: kept[layer], default=ALL)
