"""Partial collapse and prototype collapse: a few directions, or a few prototypes, are left of a joint embedding."""

from collections.abc import Mapping

from lightning_collapse.rules.base import UNDECIDED, Rule, register_rule
from lightning_collapse.rules.history import Curve, Evidence
from lightning_collapse.rules.progress import LOSS, RECALL, UNHARMED, is_harmed, may_come_alive
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Point

POINTS, SHARE, MANY = 16, 0.7, 64
"""Before this share of the planned points, at least 16 and at most 64, nothing is said of a joint embedding; before the
sixteenth point nothing of prototypes and codes."""
RANK, UNUSED = "eigenvalue_effective_rank", "unused_codes"
"""The second tells a codebook from a softmax."""


@register_rule
class PartialCollapse(Rule):
    """A joint embedding keeps few directions, and one view finds the other hardly better than at the beginning.

    No rank tells this alone: healthy joint embeddings fall to a tenth of what isotropic noise reads and recover, and
    lost directions may be filled with noise. Nor does recall: it is flat for a third of a healthy run. So both count at
    once: the effective rank of eigenvalues as a share of its null, times the recall between the two views as a multiple
    of that of the untrained network, is a fifth or less, where healthy runs end between .3 and 2; the rank has fallen
    to half of its beginning, so that what never learned is left alone; and neither of them rises, by a robust trend
    over the last sixteen points, nor has the rank come back to half as much again as its lowest level, so that what
    recovers, or has, is. Said of the layers that the loss compares with each other,
    or where these are not known of all that see two views, and of batches with at least 32 samples to tell apart. A
    healthy embedding may lie low for more than half of a short run: nothing is said before seven tenths of the planned
    points, or before the 64th. The finding is that of Jing et al. (2022, arXiv 2110.09348) and Li et al. (2022, arXiv
    2203.12719); the numbers are ours.

    Example:
        >>> from lightning_collapse.rules import Judge
        >>> judge, task = Judge(["partial_collapse"]), Task("self-supervised", embeddings=frozenset({"projector"}))
        >>> judge.planned = 40
        >>> for step in range(40):
        ...     rank = Point("collapse", "projector", RANK, step, 1 + 19 * 0.8**step, n=256, null=30.0)
        ...     recall = Point("views", "projector", "recall_at_1", step, 0.02 + 0.2 * 0.8**step, n=256, null=0.004)
        ...     _ = judge.update([rank, recall], task)
        >>> [verdict.name for verdict in judge.verdicts]
        ['partial collapse in `projector`']
    """

    kind = "partial_collapse"
    says = "Most directions of the embedding are lost in `{layer}`, and they do not come back."
    family = "collapse"
    measures = (RANK,)
    optional = (RECALL,)
    follows = (RANK, RECALL)
    lower_is_worse = (RANK, RECALL)
    tasks = ("self-supervised",)
    patience = 3
    line = 0.2
    fallen, recovered = 0.5, 1.5
    chance = 1 / 32
    advice = "Add `Regularizer(VICReg(), layer=...)`, or `BarlowTwins()` for `VICReg()`, or check the stop-gradient."
    paper = "Jing et al., 2022, arXiv 2110.09348; Li et al., 2022, arXiv 2203.12719"

    def applies_to(self, layer: str, task: Task) -> bool:
        """The layers that the loss compares with each other, if they are known."""
        return super().applies_to(layer, task) and (not task.embeddings or layer in task.embeddings)

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Nothing is told by one point."""
        return 0.0

    def weigh(self, evidence: Evidence) -> float:
        """A fifth over rank times recall, or half of the rank's fall; undecided where one of them rises, or has."""
        rank, recall = (evidence.history.get(name) for name in (RANK, RECALL))
        point = evidence.points.get(RECALL)
        null = evidence.points[RANK].null
        if rank is None or recall is None or point is None or not null > 1:
            return 0.0
        if not 0 < point.null <= self.chance:
            return 0.0
        if min(rank.count, recall.count) < max(POINTS, min(SHARE * (evidence.planned or MANY), MANY)):
            return 0.0
        product = rank.level / null * recall.level / max(recall.first, point.null)
        severity = min(self.line / max(product, 1e-300), self.fallen * rank.first / max(rank.level, 1e-300))
        back = rank.level >= self.recovered * rank.lowest
        return min(severity, UNDECIDED) if back or "rising" in (rank.direction(), recall.direction()) else severity

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Rank and recall at this point."""
        rank = points[RANK]
        return f"over {rank.n} rows the eigenvalue effective rank is {rank.value:.1f}"

    def tell(self, evidence: Evidence) -> str:
        """Rank and recall, their beginning, the null and chance."""
        rank, recall = (evidence.history[name] for name in (RANK, RECALL))
        null, chance = evidence.points[RANK].null, evidence.points[RECALL].null if RECALL in evidence.points else 0.0
        return (
            f"the eigenvalue effective rank is {rank.level:.1f}, where isotropic noise reads {null:.0f} and the run"
            f" began with {rank.first:.1f}; one view finds the other in {100 * recall.level:.0f} % of the cases, where"
            f" the untrained network did in {100 * recall.first:.0f} % and chance does in {100 * chance:.1f} %; neither"
            " rises"
        )


@register_rule
class PrototypeCollapse(Rule):
    """Nearly all rows choose the same few prototypes, clusters, codes or experts.

    The perplexity of the choices is above one by a tenth of what it would be if all were equally likely, over as many
    rows, or less, and does not rise, from the sixteenth point on. Where a target is compared with the softmax it
    says nothing, and is not drawn. Fewer than four outputs in use by chance are too few to tell. One expert may be
    enough: where features are not compared with each other, it is a notice as long as the loss has kept nine tenths
    of what it gained.

    Of a codebook it is a quarter, and a failure whatever the loss: what does not choose different codes cannot be told
    apart behind them. But most begin with a few, until unused ones are moved or drawn along: nothing is said, for
    seven tenths of the run or 64 points, of one that has never used a quarter. That prototypes die without
    centering or equal partition is the finding of Caron et al. (2021, arXiv 2104.14294; 2020, arXiv 2006.09882),
    that experts do of Shazeer et al. (2017, arXiv 1701.06538), that codes do of Lancucki et al. (2020, arXiv
    2005.08520); the numbers are ours.

    Example:
        >>> from lightning_collapse.rules import Judge
        >>> judge = Judge(["prototype_collapse"])
        >>> for step in range(30):
        ...     chosen = 1 + 39 * 0.7**step
        ...     point = Point("collapse", "prototypes", "assignment_perplexity", step, chosen, n=256, null=60.0)
        ...     _ = judge.update([point])
        >>> [verdict.name for verdict in judge.verdicts]
        ['prototype collapse in `prototypes`']
    """

    kind = "prototype_collapse"
    says = "Nearly all inputs choose the same few prototypes, clusters, codes or experts in `{layer}`."
    family = "collapse"
    measures = ("assignment_perplexity",)
    optional = (UNUSED,)
    follows = ("assignment_perplexity", LOSS)
    lower_is_worse = ("assignment_perplexity",)
    patience = 3
    share, code_share = 0.1, 0.25
    least_null = 4.0
    advice = (
        "Balance the scores (centering, Sinkhorn), move codes that no row chooses to where rows are, or spread the"
        " input with `Regularizer(KoLeo(), layer=...)`."
    )
    paper = "Caron et al., 2021, arXiv 2104.14294"

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """Nothing is told by one point."""
        return 0.0

    def weigh(self, evidence: Evidence) -> float:
        """A tenth, or a quarter, of the null over the perplexity, counted from one; undecided while it rises."""
        [name] = self.measures
        curve: Curve | None = evidence.history.get(name)
        null = evidence.points[name].null
        share = self.code_share if UNUSED in evidence.points else self.share
        if curve is None or curve.count < POINTS or not null > self.least_null:
            return 0.0
        severity = share * (null - 1) / max(curve.level - 1, 1e-300)
        waits = UNUSED in evidence.points and may_come_alive(evidence, name, share * null)
        return min(severity, UNDECIDED) if waits or curve.direction() == "rising" else severity

    def excuse(self, evidence: Evidence) -> str:
        """That the loss has come to no harm, but for a codebook."""
        return "" if UNUSED in evidence.points or is_harmed(evidence) else UNHARMED

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """Perplexity, null and beginning, and of a codebook the codes without a row."""
        [name] = self.measures
        used, unused = points[name], points.get(UNUSED)
        return (
            f"over {used.n} rows the perplexity of the choices is {used.value:.1f}, where equally likely ones read"
            f" {used.null:.1f} and the run began with {baseline[name]:.1f}"
        ) + (f"; {100 * unused.value:.0f} % of the codes are chosen by none" if unused is not None else "")
