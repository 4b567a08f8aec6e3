"""Activation outliers: numbers that begin to stand out, and a format that is about to overflow."""

from collections.abc import Mapping

from lightning_collapse.rules.base import ALL, DetectorRule, Rule, register_rule
from lightning_collapse.rules.detector import Detector
from lightning_collapse.utilities.points import Point


@register_rule
class Headroom(Rule):
    """The largest activation of a layer is within one doubling of the largest number of its format, twice in a row.

    In ``float16`` that is a magnitude above 32,752. The wider formats do not get there: of ``bfloat16`` and ``float32``
    it is 1.7e38, where the next product is infinite. One bit is ours.

    Example:
        >>> points = {"headroom_bits": Point("activations", "encoder", "headroom_bits", 9, 0.4, n=256)}
        >>> Headroom().severity(points, {"headroom_bits": 6.0}) > 1
        True
    """

    kind = "headroom"
    says = "Activations are about to overflow their number format in `{layer}`."
    family = "activations"
    measures = ("headroom_bits",)
    lower_is_worse = ("headroom_bits",)
    patience = 2
    least = 1.0
    advice = "Train in bfloat16, or return with `Rollback()`, which lowers the learning rate."
    paper = "Micikevicius et al., 2018, arXiv 1710.03740"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Half of what is left of the format, in units of the largest activation, inverted; 1 at one doubling."""
        return float(2.0 ** (self.least - min(max(points["headroom_bits"].value, -1.0), 1000.0)))

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Doublings that are left, and were in the beginning."""
        left, before = points["headroom_bits"].value, baseline["headroom_bits"]
        return f"the largest activation may double {left:.2f} times before it is infinite, and began with {before:.1f}"


@register_rule
class ActivationOutliers(DetectorRule):
    """The largest crest factor or neuron kurtosis of any layer shifts upwards, by a detector of changes.

    No level is a failure: networks that are well have outliers, and what is a fault in one is the working state of
    another. Each of the two curves has a detector of its own, which share a budget of one false alarm in a hundred
    runs of noise; a layer with strong outliers hides the onset in another one. Networks that learn draw no such noise:
    it spoke in 5 of 89 healthy runs of the zoo, and in none of eight small networks that explode; so it is a
    notice. Rule and numbers are ours.

    Example:
        >>> ActivationOutliers().detectors("all", planned=100)["crest_factor"].side
        'rise'
    """

    kind = "activation_outliers"
    says = "Single activations begin to stand out from the others in `{layer}`."
    family = "activations"
    measures = ("crest_factor", "neuron_kurtosis")
    higher_is_worse = ("crest_factor", "neuron_kurtosis")
    informative = True
    paper = "He et al., 2024, arXiv 2405.19279; Sun et al., 2024, arXiv 2402.17762"

    def detectors(self, layer: str, planned: int | None) -> Mapping[str, Detector]:
        """One of each curve."""
        return {name: Detector(planned, curves=len(self.measures)) for name in self.measures if layer == ALL}

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Both curves, and where the run began."""
        crest, kurtosis = (points[name] for name in self.measures)
        return (
            f"the largest activation is {crest.value:.3g} root mean squares, where the run began with"
            f" {baseline['crest_factor']:.3g}, and the kurtosis over neurons {kurtosis.value:.3g}, where it began with"
            f" {baseline['neuron_kurtosis']:.3g}"
        )

    def worst_layer(
        self, layers: Mapping[str, Mapping[str, Point]], baselines: Mapping[str, Mapping[str, float]]
    ) -> str:
        """The layer that has gained most in either."""

        def gain(layer: str) -> float:
            return max(layers[layer][name].value / max(baselines[layer][name], 1e-300) for name in self.measures)

        return max((layer for layer in layers if layer != ALL), key=gain, default=ALL)
