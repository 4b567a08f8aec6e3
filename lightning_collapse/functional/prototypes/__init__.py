"""Class prototypes in place of old samples: FeTrIL, TEEN, hardness-aware sampling, and compatible models (CL2R).

All names are here and not beside the other functions: ``from lightning_collapse.functional import prototypes``.
"""

from lightning_collapse.functional.prototypes.compatibility import (
    Compatibility,
    compatibility,
    compatibility_weight,
    cross_recall,
)
from lightning_collapse.functional.prototypes.fetril import fetril_features
from lightning_collapse.functional.prototypes.hardness import sample_prototypes, sampling_probabilities
from lightning_collapse.functional.prototypes.scores import prototype_logits
from lightning_collapse.functional.prototypes.teen import teen_calibrate

__all__ = [
    "Compatibility",
    "compatibility",
    "compatibility_weight",
    "cross_recall",
    "fetril_features",
    "prototype_logits",
    "sample_prototypes",
    "sampling_probabilities",
    "teen_calibrate",
]
