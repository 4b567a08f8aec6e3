"""Anti-collapse losses: a function and its module each, exact in data-parallel training and in any precision."""

from lightning_collapse.losses.balanced_softmax import BalancedSoftmax, balanced_cross_entropy
from lightning_collapse.losses.base import AntiCollapseLoss, TooFewRowsError
from lightning_collapse.losses.covariance import CovarianceLoss, covariance_loss
from lightning_collapse.losses.dot_regression import DotRegression, dot_regression
from lightning_collapse.losses.long_tail_collapse import LongTailCollapse, long_tail_collapse_terms
from lightning_collapse.losses.max_sup import MaxSup, label_smoothing_terms, max_suppression
from lightning_collapse.losses.schedule import LinearRamp, LinearWarmup
from lightning_collapse.losses.spectral_decoupling import SpectralDecoupling, spectral_decoupling
from lightning_collapse.losses.variance import VarianceLoss, variance_loss
from lightning_collapse.losses.vicreg import VICReg, vicreg_terms

__all__ = [
    "AntiCollapseLoss",
    "BalancedSoftmax",
    "CovarianceLoss",
    "DotRegression",
    "LinearRamp",
    "LinearWarmup",
    "LongTailCollapse",
    "MaxSup",
    "SpectralDecoupling",
    "TooFewRowsError",
    "VICReg",
    "VarianceLoss",
    "balanced_cross_entropy",
    "covariance_loss",
    "dot_regression",
    "label_smoothing_terms",
    "long_tail_collapse_terms",
    "max_suppression",
    "spectral_decoupling",
    "variance_loss",
    "vicreg_terms",
]
