"""Rules on instability: a loss that stays high, a gradient norm that announces it, and steps that are not finite."""

import re
from collections.abc import Mapping
from math import inf, isfinite, isnan

from lightning_collapse.rules.base import ALL, Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Point


class _Stability(Rule):
    """What the rules on the steps of an optimizer have in common."""

    family = "stability"
    measures = ("surge",)
    patience = 1
    recovery = 1

    def readable(self, points: Mapping[str, Point]) -> bool:
        """Also where a gradient is infinite, and modules, of which no more is known than how much theirs rose."""
        return "surge" in points and not isnan(points["surge"].value)

    def applies_to(self, layer: str, task: Task) -> bool:
        """The steps of an optimizer; modules are only named."""
        return layer == ALL or _is_optimizer(layer)

    def onset(self, evidence: Evidence, since: int) -> int:
        """The step before the shift."""
        point = evidence.points.get("since")
        return int(point.value) if point is not None and isfinite(point.value) else since

    def sentence(self, layer: str) -> str:
        """Without a word of where, if no module's gradient rose."""
        named = layer != ALL and not _is_optimizer(layer)
        return super().sentence(layer) if named else re.split("[,;] ", self.says)[0] + "."

    def worst_layer(
        self, layers: Mapping[str, Mapping[str, Point]], baselines: Mapping[str, Mapping[str, float]]
    ) -> str:
        """The module whose gradient rose most in the first burst."""
        surges = {layer: points["surge"].value for layer, points in layers.items() if layer != ALL}
        return max(surges, key=lambda layer: surges[layer], default=ALL)

    def where(
        self,
        layer: str,
        layers: Mapping[str, Mapping[str, Point]],
        baselines: Mapping[str, Mapping[str, float]],
    ) -> str:
        """Of one of several optimizers the module that it trains whose gradient rose most."""
        if layer == ALL:
            return super().where(layer, layers, baselines)
        own = {n.removeprefix(f"{layer}."): points for n, points in layers.items() if n.startswith(f"{layer}.")}
        worst = self.worst_layer(own, baselines)
        return layer if worst == ALL else worst


def _is_optimizer(layer: str) -> bool:
    return layer.removeprefix("optimizer_").isdigit()


@register_rule
class LossSpike(_Stability):
    """The loss has jumped and does not come back: a sequential test says that its level rose, and it stays there.

    It has stayed above the middle between the old level and the peak for 32 steps, or above four times the old level
    and above where the run began for 8. The test has a budget of one false alarm in a hundred healthy runs; what
    lasts less is a spike of the curves ``loss_z`` and ``loss_cusum``, and no failure. That spikes of the loss end runs,
    and that those who trained at scale went back and passed over batches, is told by Chowdhery et al. (2022, arXiv
    2204.02311); the test is Page's (1954), the numbers are ours, chosen on 267 healthy and 141 failing runs.

    Example:
        >>> values = {"surge": 9.0, "loss_shifted": 40.0, "loss_over_start": 0.0}
        >>> LossSpike().severity({name: Point("stability", "all", name, 99, x) for name, x in values.items()}, {}) > 1
        True
    """

    kind = "loss_spike"
    says = "The loss jumped and does not come back; gradients rose first in `{layer}`."
    optional = ("loss_shifted", "loss_over_start")
    higher_is_worse = ("loss_shifted", "loss_over_start")
    lasting, beginning = 32, 8
    advice = "Return with `Rollback()`, or leave such steps out from the start with `SkipStep()`."
    paper = "Chowdhery et al., 2022, arXiv 2204.02311"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Steps on the new level over 32, or above the first losses over 8."""
        return max(points["loss_shifted"].value / self.lasting, points["loss_over_start"].value / self.beginning)

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """How long, and where."""
        shifted, over_start = (points[name].value for name in ("loss_shifted", "loss_over_start"))
        words = f"the loss has stayed on a new level for {shifted:.0f} steps"
        if over_start:
            words += f", for {over_start:.0f} in a row above four times the old one and above where the run began"
        return words


@register_rule
class DivergenceAhead(_Stability):
    """The gradient norm has risen to three times its level while the loss does not fall: a notice, and no failure.

    Norm spikes tend to come before loss spikes (Takase et al. 2023, arXiv 2312.16903), and norms rise in healthy runs
    too: of 267 the same was seen in 9, and in 21 of 141 that failed, 61 steps before the loss in the median of those
    whose loss rose in the end. So it is said once, and nothing else follows from it.

    Example:
        >>> values = {"surge": 1.0, "grad_norm_ratio": 4.0, "loss_change": 1.0, "grad_norm_cusum": 1.5}
        >>> points = {name: Point("stability", "all", name, 99, x) for name, x in values.items()}
        >>> DivergenceAhead().severity(points, {}) > 1
        True
    """

    kind = "divergence_ahead"
    says = "Gradients grow while the loss stands still, most in `{layer}`."
    optional = ("grad_norm_ratio", "loss_change", "grad_norm_cusum")
    higher_is_worse = ("grad_norm_ratio", "loss_change")
    growth, standstill = 3.0, 0.9
    informative = True
    paper = "Takase et al., 2023, arXiv 2312.16903"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The growth of the norm over 3, or the loss over nine tenths of what it was, if that is less."""
        return min(points["grad_norm_ratio"].value / self.growth, points["loss_change"].value / self.standstill)

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Both ratios."""
        return (
            f"the gradient norm is {points['grad_norm_ratio'].value:.3g} times what it was before it began to rise, and"
            f" the loss {points['loss_change'].value:.3g} times"
        )


@register_rule
class NonFiniteStep(_Stability):
    """The loss or the gradient was NaN or infinite in the last step, or in the last eight where such steps are skipped.

    An infinite gradient under a gradient scaler is the scaler's search for its factor (Micikevicius et al. 2018, arXiv
    1710.03740) and is none. The monitor counts such steps; a single one that was skipped does no harm.

    Example:
        >>> values = {"surge": 1.0, "nonfinite_in_a_row": 1.0, "nonfinite_steps": 1.0, "skipped": 0.0}
        >>> NonFiniteStep().severity({name: Point("stability", "all", name, 99, x) for name, x in values.items()}, {})
        inf
    """

    kind = "non_finite_step"
    says = "The loss or its gradient is NaN or infinite, first in `{layer}`."
    optional = ("nonfinite_in_a_row", "nonfinite_steps", "skipped")
    higher_is_worse = ("nonfinite_in_a_row",)
    in_a_row = 8
    advice = "Return with `Rollback()`, or leave such steps out from the start with `SkipStep()`."
    paper = "Micikevicius et al., 2018, arXiv 1710.03740"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Infinite if there are so many."""
        enough = self.in_a_row if points["skipped"].value else 1
        return inf if points["nonfinite_in_a_row"].value >= enough else 0.0

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """How many."""
        return (
            f"{points['nonfinite_in_a_row'].value:.0f} steps in a row were not finite, and"
            f" {points['nonfinite_steps'].value:.0f} since the beginning"
        )


@register_rule
class SkippedSteps(_Stability):
    """Steps are skipped too often, or so many in a row that their level was accepted as the new one.

    Healthy runs of Gaussian or log-normal noise have fewer than one burst in 10,000 steps, so that ten in the last
    1,000 are no chance but a fault of the data, of the numbers or of the learning rate. After
    ``StabilityMonitor(limit=8)`` bursts in a row the loss is where it stays: skipping has ended, and what was to be
    kept out is let in. Skipping is after OLMo-core (Allen Institute for AI; code); both limits are ours.

    Example:
        >>> values = {"surge": 1.0, "skipped": 30.0, "skipped_share": 0.02, "accepted": 0.0}
        >>> points = {name: Point("stability", "all", name, 99, x) for name, x in values.items()}
        >>> SkippedSteps().severity(points, {})
        2.0
    """

    kind = "skipped_steps"
    says = "Too many steps are skipped; gradients rose first in `{layer}`."
    optional = ("skipped", "skipped_share", "accepted")
    higher_is_worse = ("skipped_share", "accepted")
    share = 0.01
    advice = "Look at the batches of these steps, and lower the learning rate, as `Rollback()` does."
    paper = "Chowdhery et al., 2022, arXiv 2204.02311"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The share over 1 %; at least 1 if a new level was accepted."""
        accepted = min(points["accepted"].value, 1.0) if points["skipped"].value else 0.0
        return max(points["skipped_share"].value / self.share, accepted)

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """How many, and whether a new level was accepted."""
        recent = 1000 * points["skipped_share"].value
        words = f"{points['skipped'].value:.0f} steps were skipped, {recent:.0f} of the last 1,000"
        return words + ("; the last bursts in a row were taken for a new level" if points["accepted"].value else "")
