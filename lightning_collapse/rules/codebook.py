"""Codebook collapse: most codes of a vector quantizer are dead, and the others are few."""

from collections.abc import Mapping

from lightning_collapse.rules.base import UNDECIDED, Rule, register_rule
from lightning_collapse.rules.history import Evidence
from lightning_collapse.rules.progress import may_come_alive
from lightning_collapse.utilities.points import Point

PERPLEXITY, DEAD, MOTION, ERROR = "perplexity", "dead", "motion", "quantization_error"


@register_rule
class CodebookCollapse(Rule):
    """Few codes are chosen, and most of the others are dead.

    For two points half of the codes are dead, each of them 20 hits overdue by its own share so far, and the perplexity
    is below half of what chance leaves of equally likely codes, and of the largest of the run's first points, or below
    a quarter of chance. Nothing is said before the sixteenth point, since most codebooks begin with a few codes until
    others are drawn along or put elsewhere, nor while the perplexity rises; nor, for seven tenths of the run or 64
    points, of one that has never used a quarter of what chance leaves.

    Neither alone is a failure. Skewed data have a low perplexity and rare codes, which are not overdue; later levels of
    a residual quantizer are flatter than the first; and small batches hit few codes, which chance explains. A codebook
    that does not move is trained by nobody: of it this is a notice. That codes die is the finding of Lancucki et al.
    (2020, arXiv 2005.08520), how many in large codebooks of Zhu et al. (2024, arXiv 2411.02038); the numbers are ours.

    Example:
        >>> from lightning_collapse.rules import Judge
        >>> judge = Judge(["codebook_collapse"])
        >>> for step in range(20):
        ...     values = {"perplexity": max(400 * 0.7**step, 5.0), "dead": min(0.1 * step, 0.9)}
        ...     points = [Point("codebook", "vq", name, step, value, 4096, 480.0) for name, value in values.items()]
        ...     _ = judge.update(points)
        >>> [verdict.name for verdict in judge.verdicts]
        ['codebook collapse in `vq`']
    """

    kind = "codebook_collapse"
    says = "Nearly all rows choose the same few codes of `{layer}`; most codes are dead."
    family = "codebook"
    measures = (PERPLEXITY, DEAD)
    optional = (MOTION, ERROR)
    follows = (PERPLEXITY,)
    lower_is_worse = (PERPLEXITY,)
    higher_is_worse = (DEAD,)
    supersedes = ("prototype_collapse",)
    patience = 2
    share, share_of_chance, dead, least_null, least_points = 0.5, 0.25, 0.5, 4.0, 16
    advice = (
        "Move codes that no row chooses to where rows are, let all of them move (a matrix before the codebook), lower"
        " its dimension, or return with `Rollback()`."
    )
    paper = "van den Oord et al., 2017, arXiv 1711.00937; Lancucki et al., 2020, arXiv 2005.08520"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """How far the perplexity is below its lines, or how many codes are dead if that is less."""
        used = points[PERPLEXITY]
        if not used.null > self.least_null:
            return 0.0
        line = max(self.share * min(used.null, baseline[PERPLEXITY]), self.share_of_chance * used.null)
        return min(line / max(used.value, 1e-300), points[DEAD].value / self.dead)

    def weigh(self, evidence: Evidence) -> float:
        """The severity; undecided at first, and while the perplexity rises."""
        severity, curve = self.severity(evidence.points, evidence.baseline), evidence.history.get(PERPLEXITY)
        early = curve is None or curve.count < self.least_points or curve.direction() == "rising"
        early = early or may_come_alive(evidence, PERPLEXITY, self.share_of_chance * evidence.points[PERPLEXITY].null)
        return min(severity, UNDECIDED) if early else severity

    def excuse(self, evidence: Evidence) -> str:
        """That nobody trains it: it stands still, and is what rows are compared with, not behind a matrix."""
        motion = evidence.points.get(MOTION)
        still = motion is not None and motion.value == 0 and ERROR in evidence.points
        return "its codes do not move, and this is no failure of the training" if still else ""

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Perplexity, null and beginning, and the dead codes."""
        used = points[PERPLEXITY]
        return (
            f"over {used.n} rows the perplexity of the codes is {used.value:.1f}, where equally likely ones read"
            f" {used.null:.1f} and the run began with {baseline[PERPLEXITY]:.1f}; {100 * points[DEAD].value:.0f} % of"
            " them are dead"
        )
