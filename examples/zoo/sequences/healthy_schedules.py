"""Healthy transformers with odd optimizers: heavy weight decay, tiny steps, a rate that drops."""

from examples.zoo.specimen import Habitat, Specimen

from .tagger import Tagger, tagging
from .word_model import language_model


def heavy_decay(seed: int) -> Habitat:
    """AdamW with a weight decay of 1."""
    return tagging(seed, Tagger(depth=2, rate=3e-3, decay=1.0))


def tiny_steps(seed: int) -> Habitat:
    """A learning rate of 1e-6: nothing moves, nothing is lost."""
    return tagging(seed, Tagger(depth=2, rate=1e-6), steps=300)


def drops(step: int) -> float:
    """A warm-up, and two drops to a fifth."""
    return min((step + 1) / 60, 1.0) * 0.2 ** ((step >= 300) + (step >= 450))


def scheduled(seed: int) -> Habitat:
    """A long warm-up and drops of the learning rate."""
    return language_model(seed, drops)


SPECIMENS = (
    Specimen(
        "heavy decay of a transformer", heavy_decay, "weights shrink, and accuracy does not", family="transformer"
    ),
    Specimen("tiny steps of a transformer", tiny_steps, "nothing moves", family="transformer"),
    Specimen("rate that drops", scheduled, "a long warm-up and drops of the rate", family="language model"),
)
