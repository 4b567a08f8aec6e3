"""Gradient projection: which input directions old tasks need, how much, and which tasks are near."""

from lightning_collapse.functional.projection.hebbian import oja_directions, oja_step
from lightning_collapse.functional.projection.importance import accumulated_importance, direction_importance
from lightning_collapse.functional.projection.input_directions import deflated, input_directions
from lightning_collapse.functional.projection.null_space import null_share, null_space
from lightning_collapse.functional.projection.scaled_weight import scaled_weight
from lightning_collapse.functional.projection.trust_region import trust_region

__all__ = [
    "accumulated_importance",
    "deflated",
    "direction_importance",
    "input_directions",
    "null_share",
    "null_space",
    "oja_directions",
    "oja_step",
    "scaled_weight",
    "trust_region",
]
