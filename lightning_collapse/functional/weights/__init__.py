"""Weights and units: how sparse they are, which could be one, and how much of an activation pruning or merging left."""

from lightning_collapse.functional.weights.clones import cloned_fraction
from lightning_collapse.functional.weights.composition import composition_scores
from lightning_collapse.functional.weights.magnitude import magnitude_ratio, std_ratio
from lightning_collapse.functional.weights.mergeable import MergedUnits, merge_units, mergeable_share
from lightning_collapse.functional.weights.orthogonality import orthogonality_defect
from lightning_collapse.functional.weights.pq_index import pq_index, sap_keep_count
from lightning_collapse.functional.weights.sparsity import non_zero_share, weights_per_unit

__all__ = [
    "MergedUnits",
    "cloned_fraction",
    "composition_scores",
    "magnitude_ratio",
    "merge_units",
    "mergeable_share",
    "non_zero_share",
    "orthogonality_defect",
    "pq_index",
    "sap_keep_count",
    "std_ratio",
    "weights_per_unit",
]
