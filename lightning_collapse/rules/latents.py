"""Posterior collapse: the latent of an autoencoder tells nothing of the input, on its prior or on a point."""

from collections.abc import Mapping

from lightning_collapse.rules.base import UNDECIDED, Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import LOSS, SURE, is_harmed, may_come_alive
from lightning_collapse.utilities.points import Point

BEST, CEILING, KL, AT_POINT = "largest_ceiling", "information_ceiling", "kl", "at_point"
INACTIVE, NOTHING = 5e-3, 5e-4
"""Nats of a unit whose mean varies by a hundredth of its variance, as in what Burda et al. (2016) call active, and by a
tenth of that."""


class LatentRule(Rule):
    """What both verdicts on latents share: they wait until a fresh network has had its time, and while it takes off."""

    family = "latent"
    measures = (BEST, CEILING, KL, AT_POINT)
    follows = (BEST, LOSS)

    def weigh(self, evidence: Evidence) -> float:
        """The severity; undecided before the eighth point, and while the best unit tells more from point to point."""
        severity, best = self.severity(evidence.points, evidence.baseline), evidence.history.get(BEST)
        waits = best is None or best.count < SURE or best.direction() == "rising"
        return min(severity, UNDECIDED) if waits else severity

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """What the units can tell, and the divergence, which is no proof of it."""
        best, ceiling, kl, at_point = (points[name] for name in self.measures)
        return (
            f"over {best.n} posteriors all units together can tell {max(ceiling.value, 0):.2g} nats of the input, the"
            f" best one {best.value:.2g} (at most {baseline[BEST]:.2g} at the beginning); the divergence from the prior"
            f" is {kl.value:.2g} nats, and {100 * at_point.value:.0f} % of the units lie on a point"
        )


@register_rule
class PosteriorCollapse(LatentRule):
    """All inputs have the same posterior: not even the best unit can tell 0.0005 nats of them.

    Its mean varies then by a thousandth of its variance, a tenth of what Burda et al. (2016) call active. After sixteen
    points that line is enough if the best unit falls. What a unit can tell at most is read from the spread of its means
    beside its own variance, whatever the prior: a divergence that free bits hold up, or of posteriors that lie together
    far from the prior as in the first steps of healthy networks, is none of it. So the divergence has no direction in
    which it is worse, nor has the sum over units, where hundreds of them add up to something.

    Nothing is said before the eighth point, nor while the best unit rises by a robust trend: a fresh network tells
    as little. Nor of a latent that has never told a hundredth of a nat, for seven tenths of the run or 64 points:
    while the divergence is warmed up, healthy ones wait for their decoder. Units that are idle beside one that is
    not are what the optimum of a linear model has, and no failure. That such latents are the optimum where the
    decoder's variance is large is shown by Lucas et al. (2019, arXiv 1911.02469); the numbers are ours.

    Example:
        >>> values = {"largest_ceiling": 1e-4, "information_ceiling": 5e-4, "kl": 3.0, "at_point": 0.0}
        >>> points = {name: Point("latent", "fc_mu", name, 9, value, n=128) for name, value in values.items()}
        >>> round(PosteriorCollapse().severity(points, values))
        5
    """

    kind = "posterior_collapse"
    says = "The latent `{layer}` is the same for all inputs and tells nothing of them."
    lower_is_worse = (BEST,)
    supersedes = ("complete_collapse", "dimensional_collapse")
    advice = (
        "Sum the error over outputs as the divergence is summed over units, lower the divergence's weight or raise it"
        " from 0, and return with `Rollback()`."
    )
    paper = "Lucas et al., 2019, arXiv 1911.02469; Hoffman & Johnson, 2016"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """0.0005 nats over what the best unit can tell."""
        return NOTHING / max(points[BEST].value, 1e-300)

    def weigh(self, evidence: Evidence) -> float:
        """The severity, by a line ten times as high where the best unit falls; undecided while none is active."""
        severity, value, best = super().weigh(evidence), evidence.points[BEST].value, evidence.history.get(BEST)
        if may_come_alive(evidence, BEST, 2 * INACTIVE):
            return min(severity, UNDECIDED)
        if value > INACTIVE:
            return severity
        falls = best is not None and best.count >= 2 * SURE and best.direction() == "falling"
        return max(severity, INACTIVE / max(value, 1e-300) if falls else UNDECIDED)


@register_rule
class PointCollapse(LatentRule):
    """All posteriors of all units lie on one point: with a variance below 1e-4, their means vary by less than 1e-2.

    The divergence cannot see it: it is large there. Latents of autoencoders with a light prior have small variances
    too, and may have a small scale: as long as the best unit can tell more than 0.0005 nats and the loss has
    kept nine tenths of what it gained, it is a notice. Divergence and sum over units have no direction, as in
    :class:`PosteriorCollapse`; the best unit has one in that notice alone. That posteriors can be drawn to one point,
    where the divergence grows, is what an attack on encoders does (Guo et al., 2024, arXiv 2408.10901); the numbers are
    ours.

    Example:
        >>> values = {"largest_ceiling": 1e-4, "information_ceiling": 5e-4, "kl": 40.0, "at_point": 1.0}
        >>> points = {name: Point("latent", "fc_mu", name, 9, value, n=128) for name, value in values.items()}
        >>> PointCollapse().severity(points, values) >= 1
        True
    """

    kind = "point_collapse"
    says = "The latent `{layer}` lies on a single point for all inputs."
    higher_is_worse = (AT_POINT,)
    supersedes = ("posterior_collapse", "complete_collapse", "dimensional_collapse")
    advice = (
        "Look for units before the latent that died, lower the learning rate, raise the weight of the divergence, and"
        " return with `Rollback()`."
    )
    paper = "Guo et al., 2024, arXiv 2408.10901"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """The share of units on a point, of which all must be."""
        return points[AT_POINT].value / (1 - 1e-6)

    def excuse(self, evidence: Evidence) -> str:
        """That units still tell something, and that the loss has come to no harm."""
        if evidence.points[BEST].value <= NOTHING or is_harmed(evidence):
            return ""
        return "the means still differ beside their variances, and the loss has come to no harm"
