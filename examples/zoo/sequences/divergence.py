"""Loss explosion: a language model that diverges from the middle of its run on, in three ways."""

from functools import partial

from examples.zoo.specimen import Habitat, Specimen

from .word_model import ONSET, language_model

WARM_UP = 30
COLLAPSES = ("complete_collapse", "dimensional_collapse")
"""A model that has diverged gives all tokens the same features."""


def schedule(growth: float, step: int) -> float:
    """A warm-up, then a constant rate, then growth."""
    return float(min((step + 1) / WARM_UP, 1.0) * growth ** max(step - ONSET, 0))


def make(seed: int, growth: float = 1.0, bad: bool = False, rounds: bool = False) -> Habitat:
    """One fault, or none."""
    return language_model(seed, partial(schedule, growth), bad, rounds)


SPECIMENS = tuple(
    Specimen(
        name,
        make,
        says,
        kind="loss_explosion",
        setting=setting,
        healthy=healthy,
        sick=sick,
        family="language model",
        claims=claims,
        onset=ONSET,
    )
    for name, says, setting, healthy, sick, claims in (
        ("learning rate that grows", "from a step on the rate grows", "growth", 1.0, 1.04, ("non_finite", *COLLAPSES)),
        ("bad batch", "the loader hangs at a batch of noise", "bad", False, True, ("catastrophic_forgetting",)),
        ("rounded weights", "weights are rounded downwards to numbers of eight bits", "rounds", False, True, COLLAPSES),
    )
)
