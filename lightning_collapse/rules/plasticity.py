"""Loss of plasticity: units have fallen silent, and the network can no longer learn."""

from collections.abc import Mapping

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import LOSS, UNHARMED, falls, is_harmed
from lightning_collapse.utilities.points import Point


@register_rule
class PlasticityLoss(Rule):
    """Half of the units of a layer that were active at the beginning of the run are dormant.

    That networks which keep learning new targets collect dormant units, and learn the less for it, is the finding of
    Sokar et al. (2023, arXiv 2302.12902); they state no share at which a layer has failed, the half is ours. A layer
    with dormant units from the start has the fewer to lose. While the loss falls and has come to no harm it is a
    notice: rectifiers become selective in networks that learn.

    Example:
        >>> values = {"dormant_fraction": 0.6}
        >>> points = {name: Point("plasticity", "encoder", name, 9, value, n=256) for name, value in values.items()}
        >>> baseline = {"dormant_fraction": 0.1}
        >>> PlasticityLoss().severity(points, baseline) > 1
        True
    """

    kind = "plasticity_loss"
    says = "Half of the units that were active have fallen silent in `{layer}`."
    family = "plasticity"
    measures = ("dormant_fraction",)
    follows = (LOSS,)
    higher_is_worse = ("dormant_fraction",)
    share = 0.5
    advice = "Bring units back with `ShrinkAndPerturb()`, or add `Regularizer(VCReg(), layer=...)` to the layer."
    paper = "Sokar et al., 2023, arXiv 2302.12902"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The share of active units that were lost, over a half."""
        active = max(1 - baseline["dormant_fraction"], 1e-300)
        return max(points["dormant_fraction"].value - baseline["dormant_fraction"], 0.0) / active / self.share

    def excuse(self, evidence: Evidence) -> str:
        """That the loss has come to no harm, as where rectifiers become selective while a network learns."""
        return UNHARMED if not is_harmed(evidence) and falls(evidence) else ""

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Dormant units, and their baseline."""
        dormant = points["dormant_fraction"]
        return (
            f"over {dormant.n} rows {100 * dormant.value:.0f} % of the units are dormant, where the run began with"
            f" {100 * baseline['dormant_fraction']:.0f} %"
        )
