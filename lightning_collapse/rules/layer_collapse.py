"""Layer collapse: pruning has cut a layer through while the network still has weights elsewhere."""

from collections.abc import Mapping

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import LOSS, UNHARMED, is_harmed
from lightning_collapse.utilities.points import Point


@register_rule
class LayerCollapse(Rule):
    """A layer that was connected keeps less than one weight per output unit, so some units must be constant.

    That pruning by one threshold for all layers empties some of them long before the network is empty is the finding of
    Tanaka et al. (2020, arXiv 2006.05467); the line of one weight per unit is ours: it is the least that leaves every
    unit an input. A layer that began with less, as one that is made of zeros, is not judged, and is sparse by choice.
    Units may be pruned whole, and healthily: while the loss comes to no harm it is a notice, unless no weight is left.

    Example:
        >>> points = {"weights_per_unit": Point("weights", "encoder", "weights_per_unit", 9, 0.5)}
        >>> LayerCollapse().severity(points, {"weights_per_unit": 256.0})
        2.0
        >>> LayerCollapse().severity({"weights_per_unit": points["weights_per_unit"]._replace(value=4.0)}, {
        ...     "weights_per_unit": 256.0})
        0.25
    """

    kind = "layer_collapse"
    says = "Pruning has left `{layer}` less than one weight per unit."
    family = "weights"
    measures = ("weights_per_unit",)
    follows = (LOSS,)
    lower_is_worse = ("weights_per_unit",)
    advice = (
        "Return with `Rollback()`, then leave every layer at least a weight per unit, or prune by the PQ index of what"
        " is left (`functional.weights.sap_keep_count`)."
    )
    paper = "Tanaka et al., 2020, arXiv 2006.05467"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """One weight over what a unit has."""
        return 1 / max(points["weights_per_unit"].value, 1e-9) if baseline["weights_per_unit"] >= 1 else 0.0

    def excuse(self, evidence: Evidence) -> str:
        """That the loss has come to no harm, if any weight is left."""
        cut = evidence.points["weights_per_unit"].value <= 0
        return "" if cut or is_harmed(evidence) else UNHARMED

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Weights per unit, and their baseline."""
        now, first = points["weights_per_unit"].value, baseline["weights_per_unit"]
        return f"a unit has {now:.2g} weights that are not zero, where the run began with {first:.4g}"
