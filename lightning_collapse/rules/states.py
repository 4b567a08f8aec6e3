"""State collapse: the memory of a recurrent layer explodes beyond the length it was trained on, or dies."""

from collections.abc import Mapping
from math import log

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import LOSS, UNHARMED, is_harmed
from lightning_collapse.utilities.points import Point

GROWTH, RMS, SMALLEST = "growth", "rms", "smallest_rms"


@register_rule
class StateCollapse(Rule):
    """The state of a head explodes when the sequence goes on beyond the training length, or has died.

    It explodes if its variance at twice the training length is a hundred times that at the length; a head that adds up
    whatever it reads makes four of it. It is dead if its root mean square is a tenth of the largest that the smallest
    head had at the beginning, and as long as the loss has kept nine tenths of what it gained that is a notice: channels
    that a network has no use for may fall silent. An explosion has no such excuse, since the loss of the training
    length cannot know what comes after it. That a few heads explode so, and that no average over heads shows it, is
    reported by Chen et al. (2024, arXiv 2410.07145); the numbers are ours.

    Example:
        >>> values = {"growth": 9.2, "rms": 3.0, "smallest_rms": 0.5}
        >>> points = {name: Point("state", "gru", name, 9, value, n=8) for name, value in values.items()}
        >>> round(StateCollapse().severity(points, values))
        2
    """

    kind = "state_collapse"
    says = "The state of `{layer}` has died, or explodes beyond the training length."
    family = "state"
    measures = (GROWTH, RMS, SMALLEST)
    follows = (LOSS,)
    higher_is_worse = (GROWTH,)
    lower_is_worse = (SMALLEST,)
    explosion, death = log(100), 0.1
    advice = (
        "Train on longer sequences than the state can hold, so that it learns to forget, bound the recurrent weight, or"
        " return with `Rollback()`."
    )
    paper = "Chen et al., 2024, arXiv 2410.07145"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The growth over that of a hundredfold variance, or a tenth of the baseline over the smallest head."""
        dead = self.death * baseline[SMALLEST] / max(points[SMALLEST].value, 1e-300)
        return max(points[GROWTH].value / self.explosion, dead)

    def excuse(self, evidence: Evidence) -> str:
        """That nothing explodes, and the loss has come to no harm."""
        explodes = evidence.points[GROWTH].value >= self.explosion
        return "" if explodes or is_harmed(evidence) else UNHARMED

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The growth, and the sizes of the largest and the smallest head."""
        growth, rms, smallest = (points[name] for name in self.measures)
        return (
            f"over {growth.n} sequences the variance of a head's state at twice the training length is"
            f" {growth.value / log(10):+.1f} powers of ten from that at the length; there heads are"
            f" {smallest.value:.2g} to {rms.value:.2g} large, and the smallest began with {baseline[SMALLEST]:.2g}"
        )
