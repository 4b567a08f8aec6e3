"""Update geometry: Adam's second moments lag behind gradients that have grown."""

from collections.abc import Mapping

from lightning_collapse.rules.base import ALL, Rule, register_rule
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Point


@register_rule
class StaleSecondMoments(Rule):
    """Gradients are more than 2.3 times what Adam divides them by, at two points in a row: a notice, and no failure.

    Of independent gradients the ratio is about 1; of a tensor of 1,024 entries or more it leaves 1 by a few hundredths.
    Where it is larger the second moments are those of gradients that were smaller, so that the step is larger than the
    learning rate says. That loss spikes follow one to eight steps behind is the finding of Wortsman et al. (2023,
    arXiv 2304.13013), 2.3 is their number, and two points are ours; it is over below 1.5. With ``beta2=0.95`` gradients
    that grow threefold at once stay under 2.3.

    Example:
        >>> point = Point("updates", "all", "rms_ratio", 9, 4.6)
        >>> StaleSecondMoments().severity({"rms_ratio": point}, {"rms_ratio": 1.0})
        2.0
    """

    kind = "stale_second_moments"
    says = "Gradients have outgrown Adam's second moments, most in `{layer}`."
    family = "updates"
    measures = ("rms_ratio",)
    higher_is_worse = ("rms_ratio",)
    patience = 2
    line = 2.3
    healthy = 1.5 / line
    informative = True
    paper = "Wortsman et al., 2023, arXiv 2304.13013"

    def applies_to(self, layer: str, task: Task) -> bool:
        """The largest of all layers only."""
        return layer == ALL

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The ratio over 2.3."""
        return points["rms_ratio"].value / self.line

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The ratio."""
        return (
            f"the root mean square of the gradients of a tensor is {points['rms_ratio'].value:.2f} times that of the"
            " second moments they are divided by"
        )

    def worst_layer(
        self, layers: Mapping[str, Mapping[str, Point]], baselines: Mapping[str, Mapping[str, float]]
    ) -> str:
        """The layer with the largest ratio."""
        found = {layer: points["rms_ratio"].value for layer, points in layers.items() if layer != ALL}
        return max(found, key=lambda layer: found[layer], default=ALL)
