"""Anti-collapse losses: a function and its module each, exact in data-parallel training and in any precision."""

from lightning_collapse.losses.barlow_twins import BarlowTwins, barlow_twins_terms
from lightning_collapse.losses.base import AntiCollapseLoss, TooFewRowsError
from lightning_collapse.losses.covariance import CovarianceLoss, covariance_loss
from lightning_collapse.losses.intl import INTL, intl_terms
from lightning_collapse.losses.schedule import LinearWarmup
from lightning_collapse.losses.spectral_transformation import SpectralTransformation, spectral_transformation_terms
from lightning_collapse.losses.variance import VarianceLoss, variance_loss
from lightning_collapse.losses.vcreg import VCReg, vcreg_terms
from lightning_collapse.losses.vicreg import VICReg, vicreg_terms
from lightning_collapse.losses.wmse import WMSE, wmse_loss

__all__ = [
    "INTL",
    "WMSE",
    "AntiCollapseLoss",
    "BarlowTwins",
    "CovarianceLoss",
    "LinearWarmup",
    "SpectralTransformation",
    "TooFewRowsError",
    "VCReg",
    "VICReg",
    "VarianceLoss",
    "barlow_twins_terms",
    "covariance_loss",
    "intl_terms",
    "spectral_transformation_terms",
    "variance_loss",
    "vcreg_terms",
    "vicreg_terms",
    "wmse_loss",
]
