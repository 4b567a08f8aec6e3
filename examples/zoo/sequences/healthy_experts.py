"""A healthy mixture of experts that uses few of them, because few are needed."""

from examples.zoo.specimen import Habitat, Specimen

from .experts import mixture


def make(seed: int) -> Habitat:
    """One linear map for all rows, and no loss of balance."""
    return mixture(seed, balance=0.0, clusters=1)


SPECIMENS = (Specimen("few experts are enough", make, "most experts see no row", family="mixture of experts"),)
