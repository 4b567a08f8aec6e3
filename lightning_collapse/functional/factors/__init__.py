"""Factors beside and below the class: subclasses, nuisance factors, and factors that a representation has lost."""

from lightning_collapse.functional.factors.linear_probe import linear_probe
from lightning_collapse.functional.factors.nuisance import NuisanceShares, nuisance_cdnv, nuisance_shares
from lightning_collapse.functional.factors.subclasses import (
    SubclassAccuracy,
    SubclassCdnv,
    subclass_accuracy,
    subclass_cdnv,
)

__all__ = [
    "NuisanceShares",
    "SubclassAccuracy",
    "SubclassCdnv",
    "linear_probe",
    "nuisance_cdnv",
    "nuisance_shares",
    "subclass_accuracy",
    "subclass_cdnv",
]
