"""A healthy mixture of experts whose router is sharp: eight clusters, one expert for each."""

from examples.zoo.specimen import Habitat, Specimen

from .experts import mixture


def make(seed: int) -> Habitat:
    """Gates near 0 and 1."""
    return mixture(seed, balance=0.1, clusters=8)


SPECIMENS = (Specimen("sharp router", make, "gates of the router are near 0 and 1", family="mixture of experts"),)
