"""Manifolds of features: how many a linear readout can tell apart, and how dense the data is on one."""

from lightning_collapse.functional.manifolds.capacity import ManifoldGeometry, manifold_capacity, manifold_geometry
from lightning_collapse.functional.manifolds.jepa_score import jepa_score

__all__ = ["ManifoldGeometry", "jepa_score", "manifold_capacity", "manifold_geometry"]
