"""Anti-collapse losses: a function and its module each, exact in data-parallel training and in any precision."""

from lightning_collapse.losses.alignment import Alignment, alignment_loss
from lightning_collapse.losses.base import AntiCollapseLoss, TooFewRowsError
from lightning_collapse.losses.coding_rate import CodingRate, coding_rate_loss
from lightning_collapse.losses.corinfomax import CorInfoMax, corinfomax_terms
from lightning_collapse.losses.covariance import CovarianceLoss, covariance_loss
from lightning_collapse.losses.mmcr import MMCR, mmcr_terms
from lightning_collapse.losses.schedule import LinearWarmup
from lightning_collapse.losses.sigreg import SIGReg, sigreg_loss
from lightning_collapse.losses.uniformity import Uniformity, uniformity_loss
from lightning_collapse.losses.variance import VarianceLoss, variance_loss
from lightning_collapse.losses.vicreg import VICReg, vicreg_terms
from lightning_collapse.losses.visreg import VISReg, visreg_terms

__all__ = [
    "MMCR",
    "Alignment",
    "AntiCollapseLoss",
    "CodingRate",
    "CorInfoMax",
    "CovarianceLoss",
    "LinearWarmup",
    "SIGReg",
    "TooFewRowsError",
    "Uniformity",
    "VICReg",
    "VISReg",
    "VarianceLoss",
    "alignment_loss",
    "coding_rate_loss",
    "corinfomax_terms",
    "covariance_loss",
    "mmcr_terms",
    "sigreg_loss",
    "uniformity_loss",
    "variance_loss",
    "vicreg_terms",
    "visreg_terms",
]
