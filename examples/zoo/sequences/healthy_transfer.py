"""Healthy transfer that looks dangerous: adapters of one direction, and little that is left to learn."""

from examples.zoo.specimen import Habitat, Specimen

from .adapters import adapted, fine_tuned


def one_direction(seed: int) -> Habitat:
    """Updates of rank one."""
    return adapted(seed, rate=5e-3, rank=1)


def little_left(seed: int) -> Habitat:
    """All weights, on the task that the model knows: the loss starts low and can only tremble."""
    return fine_tuned(seed, shift=0)


SPECIMENS = (
    Specimen("adapters of rank one", one_direction, "updates of one direction", family="adapters"),
    Specimen("little left to learn", little_left, "the loss starts low", family="adapters"),
)
