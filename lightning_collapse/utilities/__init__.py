"""What everything else stands on: the registry, layer outputs as rows, layer choice, trainer facts, sums over ranks."""

from lightning_collapse.utilities.modules import default_taps
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import (
    CURVES,
    LOSSES,
    MEASURES,
    MONITORS,
    Curve,
    register_curve,
    register_loss,
    register_measure,
)
from lightning_collapse.utilities.weight_matrices import WeightMatrix, weight_matrices

__all__ = [
    "CURVES",
    "LOSSES",
    "MEASURES",
    "MONITORS",
    "Curve",
    "Flag",
    "Point",
    "WeightMatrix",
    "default_taps",
    "register_curve",
    "register_loss",
    "register_measure",
    "weight_matrices",
]
