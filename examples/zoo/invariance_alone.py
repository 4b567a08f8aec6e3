"""Complete collapse: two views are to agree, and nothing keeps the rows apart."""

from .joint_embedding import joint_embedding
from .specimen import Habitat, Specimen


def make(seed: int, regularized: bool) -> Habitat:
    """VICReg, or its first term only."""
    return joint_embedding(seed) if regularized else joint_embedding(seed, variance=0.0, covariance=0.0)


SPECIMEN = Specimen(
    "invariance alone",
    make,
    "that two views agree is the whole loss",
    kind="complete_collapse",
    setting="regularized",
    healthy=True,
    sick=False,
    layers=("encoder*", "projector*"),
    family="joint embedding",
)
