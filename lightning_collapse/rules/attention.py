"""Attention failures: entropy collapse, overload, and logits that grow."""

from collections.abc import Mapping
from math import inf

from lightning_collapse.rules.base import ALL, DetectorRule, Rule, register_rule
from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.growth import Growth
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import LOSS, UNHARMED, is_harmed
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Point

BRIEF = "it was otherwise for a few batches only, and this is no failure"
"""What excuses a layer that returns to where it had hardly left."""


@register_rule
class AttentionEntropyCollapse(Rule):
    """Most heads of a layer look at one key each.

    The layer's normalized entropy, averaged over its heads, is a tenth of the largest it had at the beginning of the
    run, or half of its heads are below the line of :class:`~lightning_collapse.AttentionEntropyMonitor`. Such layers
    precede oscillation and divergence (Zhai et al., 2023, arXiv 2303.06296); no paper that we could read states a
    number, both are ours. The largest logit is evidence alone. Sharp heads may be what the task needs, such as those
    that look at the token before: as long as the loss has kept nine tenths of what it gained it is a notice.

    Example:
        >>> values = {"entropy_mean": 0.01, "collapsed_share": 1.0, "max_logit": 80.0}
        >>> points = {name: Point("attention", "encoder", name, 9, value, n=256) for name, value in values.items()}
        >>> baseline = {"entropy_mean": 0.9, "collapsed_share": 0.0, "max_logit": 2.0}
        >>> AttentionEntropyCollapse().severity(points, baseline) > 1
        True
    """

    kind = "attention_entropy_collapse"
    says = "Most attention heads look at a single key in `{layer}`."
    family = "attention"
    measures = ("entropy_mean", "collapsed_share", "max_logit")
    follows = (LOSS,)
    lower_is_worse = ("entropy_mean",)
    higher_is_worse = ("collapsed_share",)
    share = 0.1
    heads = 0.5
    advice = "Return with `Rollback()`, which lowers the learning rate: logits grew too fast."
    paper = "Zhai et al., 2023, arXiv 2303.06296"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """A tenth of the baseline over the entropy, or the share of collapsed heads over a half."""
        fallen = self.share * baseline["entropy_mean"] / max(points["entropy_mean"].value, 1e-300)
        return max(fallen, points["collapsed_share"].value / self.heads)

    def excuse(self, evidence: Evidence) -> str:
        """That the loss has come to no harm."""
        return "" if is_harmed(evidence) else UNHARMED

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Entropy, collapsed heads and the largest logit."""
        entropy = points["entropy_mean"]
        return (
            f"over {entropy.n} queries the normalized attention entropy is {entropy.value:.2g}, where the run began"
            f" with {baseline['entropy_mean']:.2g}; {100 * points['collapsed_share'].value:.0f} % of the heads have"
            f" collapsed, and the largest logit is {points['max_logit'].value:.3g}"
        )


@register_rule
class AttentionOverload(Rule):
    """Most heads of a layer look at all keys alike, after they did not.

    Nine in ten heads are above the overload line of :class:`~lightning_collapse.AttentionEntropyMonitor`, and fewer
    than a quarter of them were at some time before: every freshly initialized head starts overloaded, which says
    nothing, so a layer that never left its beginning is not reported, and one that did so for fewer than three of five
    points is a notice. Nor is one reported that oscillates near the threshold: the entropy must be twice as near to its
    largest value as it was at its lowest, for five points; the severity is low, and it comes and goes. Heads that count
    look at all keys alike, too: as long as the loss has kept nine tenths of what it gained it is a notice. The term is
    Jha and Reagen's (2025, arXiv 2501.03489); the numbers are ours.

    Example:
        >>> values = {"overloaded_share": 1.0, "entropy_mean": 0.99}
        >>> points = {name: Point("attention", "encoder", name, 9, value, n=256) for name, value in values.items()}
        >>> baseline = {"overloaded_share": 0.0, "entropy_mean": 0.9}
        >>> AttentionOverload().severity(points, baseline) > 1
        True
    """

    kind = "attention_overload"
    says = "Most attention heads look at all keys alike in `{layer}`."
    family = "attention"
    measures = ("overloaded_share", "entropy_mean")
    follows = (LOSS, "overloaded_share")
    higher_is_worse = ("overloaded_share", "entropy_mean")
    calibration = inf
    patience = 5
    heads = 0.9
    left = 0.25
    gain = 2.0
    advice = "Keep tokens apart with `Regularizer(KoLeo(), layer=...)` on the input of this attention."
    paper = "Jha & Reagen, 2025, arXiv 2501.03489"

    def update_baseline(self, so_far: float, value: float, count: int) -> float:
        """The smallest value of the run so far."""
        return min(so_far, value)

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The share of overloaded heads over nine tenths, or half of what the entropy has gained if that is less."""
        if baseline["overloaded_share"] >= self.left:
            return 0.0
        gain = (1 - baseline["entropy_mean"]) / max(1 - points["entropy_mean"].value, 1e-300)
        return min(points["overloaded_share"].value / self.heads, gain / self.gain)

    def excuse(self, evidence: Evidence) -> str:
        """That the loss has come to no harm, or that the layer was away for fewer points than it takes to be back."""
        share = evidence.history.get("overloaded_share")
        brief = share is not None and share.lowest >= self.left
        return (BRIEF if brief else "") if is_harmed(evidence) else UNHARMED

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Overloaded heads and the entropy, now and at its lowest."""
        share = points["overloaded_share"]
        return (
            f"over {share.n} queries {100 * share.value:.0f} % of the heads look at all keys alike, where it was"
            f" {100 * baseline['overloaded_share']:.0f} % before; the normalized attention entropy is"
            f" {points['entropy_mean'].value:.2f}, and was {baseline['entropy_mean']:.2f}"
        )


@register_rule
class AttentionLogitGrowth(DetectorRule):
    """The largest attention logit of all heads begins to grow faster than it did.

    Told by a detector (:class:`~lightning_collapse.rules.Growth`) with a budget of one false alarm in a hundred runs,
    on the ratio of two points that follow each other: logits of healthy runs grow, too, but ever more slowly. Logits
    that grow without end precede entropy collapse and divergence (Dehghani et al., 2023, arXiv 2302.05442). On the
    specimens of the zoo with attention it is silent in all 105 healthy runs, and tells of 21 of the 50 failing ones.
    """

    kind = "attention_logit_growth"
    says = "Attention logits grow faster than they did, most in `{layer}`."
    family = "attention"
    measures = ("max_logit",)
    follows = (LOSS,)
    higher_is_worse = ("max_logit",)
    recovery = 2
    advice = "Bound them with `QKClip(tau=100.0)`, or return with `Rollback()`."
    paper = "Dehghani et al., 2023, arXiv 2302.05442"

    def detectors(self, layer: str, planned: int | None) -> Mapping[str, Detector]:
        """Of the growth of the largest logit."""
        return {"max_logit": Growth(planned)} if layer == ALL else {}

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The logit, now and at the beginning."""
        return (
            f"the largest attention logit is {points['max_logit'].value:.3g} and grows ever faster, where the run began"
            f" with {baseline['max_logit']:.3g}"
        )

    def worst_layer(
        self, layers: Mapping[str, Mapping[str, Point]], baselines: Mapping[str, Mapping[str, float]]
    ) -> str:
        """The layer with the largest logit."""
        found = {layer: points["max_logit"].value for layer, points in layers.items() if layer != ALL}
        return max(found, key=lambda layer: found[layer], default=ALL)


@register_rule
class AttentionLogitLimit(Rule):
    """The largest attention logit of a layer is above the bound of :class:`~lightning_collapse.QKClip`.

    Where it is scaled back at every step this is what the callback is for, and a notice.

    Example:
        >>> values = {"over_tau": 1.5, "clipped_share": 0.0}
        >>> points = {name: Point("qk_clip", "encoder", name, 9, value) for name, value in values.items()}
        >>> AttentionLogitLimit().severity(points, {})
        1.5
    """

    kind = "attention_logit_limit"
    says = "Attention logits in `{layer}` are above their bound."
    family = "qk_clip"
    measures = ("over_tau", "clipped_share")
    higher_is_worse = ("over_tau",)
    advice = "Have `QKClip(log_only=False)` scale them, or return with `Rollback()`."
    paper = "Kimi Team, 2025, arXiv 2507.20534"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The largest logit over the bound."""
        return max(points["over_tau"].value, 0.0)

    def expected(self, layer: str, points: Mapping[str, Point], baseline: Mapping[str, float], task: Task) -> str:
        """That they are scaled back."""
        return "they are scaled back to it after every step" if points["clipped_share"].value > 0 else ""

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The ratio."""
        return f"the largest logit is {points['over_tau'].value:.3g} times the bound of `QKClip`"
