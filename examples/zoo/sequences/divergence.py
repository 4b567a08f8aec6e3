"""Loss explosion: a language model that diverges from the middle of its run on, in three ways."""

from functools import partial

from examples.zoo.specimen import Habitat, Specimen

from .word_model import ONSET, language_model

WARM_UP = 30


def schedule(growth: float, step: int) -> float:
    """A warm-up, then a constant rate, then growth."""
    return float(min((step + 1) / WARM_UP, 1.0) * growth ** max(step - ONSET, 0))


def make(seed: int, growth: float = 1.0, bad: bool = False, rounds: bool = False) -> Habitat:
    """One fault, or none."""
    return language_model(seed, partial(schedule, growth), bad, rounds)


SPECIMENS = (
    Specimen(
        "learning rate that grows",
        make,
        "from a step on the learning rate grows",
        kind="loss_explosion",
        setting="growth",
        healthy=1.0,
        sick=1.04,
        family="language model",
        onset=ONSET,
    ),
    Specimen(
        "bad batch",
        make,
        "the loader hangs: a batch of noise comes again and again",
        kind="loss_explosion",
        setting="bad",
        healthy=False,
        sick=True,
        family="language model",
        onset=ONSET,
    ),
    Specimen(
        "rounded weights",
        make,
        "weights are rounded downwards to numbers of eight bits",
        kind="loss_explosion",
        setting="rounds",
        healthy=False,
        sick=True,
        family="language model",
        onset=ONSET,
    ),
)
