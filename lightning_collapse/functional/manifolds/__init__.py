"""Manifolds of features: how many a linear readout can tell apart, how dense the data is on one, and Jacobians."""

from lightning_collapse.functional.manifolds.capacity import ManifoldGeometry, manifold_capacity, manifold_geometry
from lightning_collapse.functional.manifolds.jacobian import JacobianIsometry, jacobian_isometry, jacobian_spectra
from lightning_collapse.functional.manifolds.jepa_score import jepa_score

__all__ = [
    "JacobianIsometry",
    "ManifoldGeometry",
    "jacobian_isometry",
    "jacobian_spectra",
    "jepa_score",
    "manifold_capacity",
    "manifold_geometry",
]
