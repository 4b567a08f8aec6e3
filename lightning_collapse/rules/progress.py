"""Progress of the loss: a second witness, of whether a network still learns, or is harmed."""

from lightning_collapse.rules.history import Evidence

LOSS, RECALL = "training/loss", "views/recall_at_1"
"""The curves of the loss and of the recall between two views, which a rule must follow."""
SURE, EMBEDDED, PROGRESS = 8, 16, 0.05
"""Points from which on the loss tells whether the network learns, those of a joint embedding, and by how much it falls
then."""
RETREAT, HALF = 0.1, 0.5
"""What share of all it has gained a loss must lose for harm, and of its first value for a network that has learned."""
IN_TURN = ("classification", "multi-label", "language model")
"""Tasks in which healthy networks learn one direction after the other; so do unknown ones whose outputs follow labels,
such as detection."""
SHARE, MANY = 0.7, 64
"""Share of the planned points, and points, after which a network that has not begun to tell its inputs apart is ill."""
BEFORE = 4
"""Points by which a latent or a codebook is told before the layers behind it, which fall silent with it."""

UNHARMED = "the loss has come to no harm, and as long as that is so this is no failure"
"""What excuses a rule whose findings alone are no failure."""


def learns(evidence: Evidence) -> bool:
    """Whether the loss still falls, or too few points tell.

    The loss of a joint embedding falls while it collapses: there the recall between two views must rise, if there is
    one.
    """
    loss, recall = (evidence.history.get(name) for name in (LOSS, RECALL))
    embeds = evidence.task.name == "self-supervised"
    if loss is None or loss.count < (EMBEDDED if embeds else SURE):
        return loss is not None
    if embeds:
        return recall is not None and recall.direction() == "rising"
    return loss.drop > PROGRESS


def falls(evidence: Evidence) -> bool:
    """Whether the loss is below its beginning and still falls; too few points are no excuse here."""
    loss = evidence.history.get(LOSS)
    return loss is not None and loss.level < loss.first and loss.drop > PROGRESS


def falls_slowly(evidence: Evidence) -> bool:
    """Whether the loss is below its beginning and falls by more than its noise, be it by a few percent."""
    loss = evidence.history.get(LOSS)
    return loss is not None and loss.level < loss.first and (loss.drop > PROGRESS or loss.direction() == "falling")


def begins(evidence: Evidence) -> bool:
    """Whether too few points tell if such a network learns, and its loss has not risen since it began."""
    loss = evidence.history.get(LOSS)
    if loss is None or not learns_in_turn(evidence) or loss.count >= SURE:
        return False
    return loss.level <= loss.first + PROGRESS * abs(loss.first)


def learns_in_turn(evidence: Evidence) -> bool:
    """Whether the task is one of :data:`IN_TURN`."""
    task = evidence.task
    return task.name in IN_TURN or (not task.name and bool(task.outputs))


def may_begin(evidence: Evidence, anywhere: bool = False) -> bool:
    """Whether this may be the plateau on which such a network first knows no more than how frequent labels are.

    Its last features are as good as equal then, for dozens of points, and healthy transformers leave it all at once. So
    do autoencoders that begin with one code, or with one mean of all that they reconstruct, in any layer. Once the loss
    has fallen, few directions may be left ``anywhere`` on it, those of how frequent labels are. It is none after seven
    tenths of the planned points, nor after the 64th, nor if the loss has risen again.
    """
    loss = evidence.history.get(LOSS)
    gained = anywhere and loss is not None and loss.level < loss.first - PROGRESS * abs(loss.first)
    ends = learns_in_turn(evidence) and (gained or evidence.layer in evidence.task.last)
    if loss is None or not (ends or evidence.task.name == "reconstruction") or not _has_time(evidence, LOSS):
        return False
    return loss.level <= loss.lowest + max(RETREAT * (loss.first - loss.lowest), PROGRESS * abs(loss.first))


def may_come_alive(evidence: Evidence, curve: str, line: float) -> bool:
    """Whether a latent or a codebook, which has never reached a line of its curve, may do so yet.

    Healthy ones tell nothing, or use one code, until what is behind them has learned to read them, for as long as in
    :func:`may_begin`; the loss may rise meanwhile, as it does where codes lag behind or a divergence is warmed up.
    """
    own = evidence.history.get(curve)
    return own is not None and not own.highest >= line and _has_time(evidence, curve, BEFORE)


def _has_time(evidence: Evidence, curve: str, less: int = 0) -> bool:
    return evidence.history[curve].count < min(SHARE * (evidence.planned or MANY), MANY) - less


def has_halved(evidence: Evidence) -> bool:
    """Whether the loss has lost half of its first value, which frequencies alone hardly give; no if it is not known."""
    loss = evidence.history.get(LOSS)
    return loss is not None and loss.first - loss.level >= HALF * abs(loss.first)


def thrives(evidence: Evidence) -> bool:
    """Whether the loss has halved and keeps what it gained, falling or not: what it had from birth does no harm."""
    return has_halved(evidence) and not is_harmed(evidence)


def is_harmed(evidence: Evidence) -> bool:
    """Whether the loss has lost a tenth of what it had gained, or has never gained anything; yes if it is not known."""
    loss = evidence.history.get(LOSS)
    if loss is None or evidence.task.name == "self-supervised":
        return True
    gained = loss.first - loss.lowest
    if gained <= PROGRESS * abs(loss.first):
        return loss.count >= SURE
    return loss.level > loss.lowest + RETREAT * gained
