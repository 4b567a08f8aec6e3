"""Token collapse: all tokens of a sequence become one vector (rank collapse over depth, mean-mode takeover)."""

from collections.abc import Mapping

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.rules.collapse import SHARE, spread_gone
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import LOSS, RECALL, SURE, UNHARMED, falls, has_halved, is_harmed, learns
from lightning_collapse.utilities.points import Point

LEARNS = (
    "one view finds the other better and better, or too few points tell, and as long as that is so this is no failure"
)


@register_rule
class TokenCollapse(Rule):
    """The tokens of a sequence are one vector, or as good as, and the loss gets nowhere.

    What is left of a sequence without its mean token is a hundredth of its length, or a tenth and a quarter of what it
    was at the beginning of the run, or the square of that where it was little then, by the lines of
    :class:`CompleteCollapse`, beside what independent tokens read; or all its tokens point one way to a hundredth.

    This is where a deep post-norm stack may begin, where features of language models lie in a narrow cone, and where
    the last blocks of a classifier end, whose tokens need to tell one thing. All of these learn: as long as the loss
    has kept nine tenths of what it gained, and falls or has halved, or before the eighth point, it is a notice; of a
    joint embedding, whose loss falls as it collapses, as long as one view finds the other better and better. Without
    a skip around attention tokens are one from the first step, and all that is learned is how often each target comes;
    under mean mode screaming the loss returns to where it began. Blocks that receive one vector before the first of
    them, from the first points on, are not to blame: their sequences are such by design. What attention does to causal
    sequences as a filter is not read at all. The numbers are ours.

    Example:
        >>> values = {"relative_residual": 0.004, "token_cosine": 0.99998}
        >>> points = {name: Point("tokens", "blocks.5", name, 9, value, n=64) for name, value in values.items()}
        >>> TokenCollapse().severity(points, {"relative_residual": 0.9, "token_cosine": 0.1}) > 1
        True
    """

    kind = "token_collapse"
    says = "The tokens of a sequence are nearly one vector in `{layer}`."
    family = "tokens"
    measures = ("relative_residual", "token_cosine")
    optional = ("received",)
    follows = (LOSS, RECALL)
    lower_is_worse = ("relative_residual",)
    higher_is_worse = ("token_cosine",)
    advice = "Let the stream pass every attention by a skip, norm before it, and return with `Rollback()`."
    paper = "Dong et al., 2021, arXiv 2103.03404; Lu, 2026, arXiv 2605.06169"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The larger of how far the residual, and the angle between tokens, are below their lines."""
        if baseline.get("received", 1.0) <= SHARE:
            return 0.0
        residual, cosine = (points[name] for name in self.measures)
        noise = residual.null if residual.null > 0 else 1.0
        gone = spread_gone(residual.value / noise, baseline["relative_residual"] / noise)
        angle: float = max(1 - cosine.value, 0.0) ** 0.5
        return max(gone, SHARE / max(angle, 1e-300))

    def excuse(self, evidence: Evidence) -> str:
        """That the loss has come to no harm, and further than to what needs no tokens; or that views are found."""
        loss = evidence.history.get(LOSS)
        if evidence.task.name == "self-supervised" and learns(evidence):
            return LEARNS
        if loss is None or is_harmed(evidence):
            return ""
        return UNHARMED if loss.count < SURE or has_halved(evidence) or falls(evidence) else ""

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Both readings, and the baseline."""
        residual, cosine = (points[name] for name in self.measures)
        return (
            f"over {residual.n} sequences {100 * residual.value:.2g} % of their length is left without the mean token"
            f" (began with {100 * baseline['relative_residual']:.2g} %), and two tokens have a cosine of"
            f" {cosine.value:.4g}"
        )
