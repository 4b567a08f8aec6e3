"""Gradient projection: optimizer updates without what would change a network where old tasks look."""

from lightning_collapse.projections.base import UpdateProjection
from lightning_collapse.projections.gpm import GPM
from lightning_collapse.projections.hebbian_subspace import HebbianSubspace
from lightning_collapse.projections.input_subspace import InputSubspace, Subspace
from lightning_collapse.projections.null_space import NullSpace
from lightning_collapse.projections.ogd import OGD
from lightning_collapse.projections.sgp import SGP

__all__ = ["GPM", "OGD", "SGP", "HebbianSubspace", "InputSubspace", "NullSpace", "Subspace", "UpdateProjection"]
