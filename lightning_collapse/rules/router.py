"""Router collapse: a mixture of experts sends its tokens to a few of them."""

from collections.abc import Mapping

from lightning_collapse.rules.base import UNDECIDED, Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import LOSS, UNHARMED, is_harmed
from lightning_collapse.utilities.points import Point

LOAD, CV2, K, DEAD = "effective_experts", "load_cv2", "experts_per_token", "dead"


@register_rule
class RouterCollapse(Rule):
    """Experts that were in use are not any more, or many get no token at all, and chance does not explain it.

    For two points the exponential of the entropy of the load is below half of the largest of the run's first points, or
    no more than a token's number of experts; or a quarter of the experts has no token in windows that would bring each
    twenty. The squared variation of the load must be more than 20 times that of a fair router with as many independent
    tokens, which sequences of 64 reach at most 16 times where half of their tokens share an expert; and the load does
    not spread, by a robust trend over the last points. How many experts a token has is part of the line, and neither
    good nor bad. Experts may be idle because few are enough: as long as the loss has kept nine tenths of what it gained
    it is a notice. That experts are starved by those that learn first is the finding of Shazeer et al. (2017, arXiv
    1701.06538); the numbers are ours.

    Example:
        >>> from lightning_collapse.rules import Judge
        >>> judge = Judge(["router_collapse"])
        >>> for step in range(12):
        ...     used = max(8 * 0.7**step, 1.0)
        ...     values = {"effective_experts": used, "load_cv2": 8 / used - 1, "experts_per_token": 1.0}
        ...     points = [Point("router", "gate", name, step, value, 512, 0.01) for name, value in values.items()]
        ...     _ = judge.update(points)
        >>> [verdict.name for verdict in judge.verdicts]
        ['router collapse in `gate`']
    """

    kind = "router_collapse"
    says = "The router `{layer}` sends nearly all tokens to the same few experts."
    family = "router"
    measures = (LOAD, CV2)
    optional = (K, DEAD)
    follows = (LOAD, LOSS)
    lower_is_worse = (LOAD,)
    higher_is_worse = (CV2, DEAD)
    patience = 2
    share, unfair, idle = 0.5, 20.0, 0.25
    least_tokens = 20
    advice = (
        "Return with `Rollback()`, then raise the weight of the balance loss, or balance the scores by a bias per"
        " expert that is left out of the gates."
    )
    paper = "Shazeer et al., 2017, arXiv 1701.06538; Fedus et al., 2021, arXiv 2101.03961"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """How far the load has fallen, or how many experts are idle, or the unfairness if that is less."""
        used, cv2 = points[LOAD].value, points[CV2]
        if not cv2.null > 0:
            return 0.0
        k = max(points[K].value, 1.0) if K in points else 1.0
        experts = k * (1 + cv2.null * cv2.n)  # since the null is (E - k) / (k n)
        lost = max(self.share * baseline[LOAD], k * (1 + 1e-6)) / max(used, 1e-300)
        if DEAD in points and cv2.n * k / experts >= self.least_tokens:
            lost = max(lost, points[DEAD].value / (self.idle * experts))
        return min(lost, cv2.value / (self.unfair * cv2.null))

    def weigh(self, evidence: Evidence) -> float:
        """The severity; undecided while the load spreads."""
        severity, curve = self.severity(evidence.points, evidence.baseline), evidence.history.get(LOAD)
        spreads = curve is not None and curve.direction() == "rising"
        return min(severity, UNDECIDED) if spreads else severity

    def excuse(self, evidence: Evidence) -> str:
        """That the loss has come to no harm."""
        return "" if is_harmed(evidence) else UNHARMED

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Experts in use, their beginning, and the load beside that of a fair router."""
        used, cv2 = points[LOAD], points[CV2]
        dead = f"; {points[DEAD].value:.0f} experts have none of them" if DEAD in points else ""
        return (
            f"{used.n} tokens use {used.value:.1f} experts in effect, where the run began with {baseline[LOAD]:.1f};"
            f" the load varies {cv2.value / cv2.null if cv2.null > 0 else 0:.0f} times as much as that of a fair"
            f" router{dead}"
        )
