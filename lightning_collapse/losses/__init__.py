"""Anti-collapse losses: a function and its module each, exact in data-parallel training and in any precision."""

from lightning_collapse.losses.base import AntiCollapseLoss, TooFewRowsError
from lightning_collapse.losses.covariance import CovarianceLoss, covariance_loss
from lightning_collapse.losses.decorrelation import FeatureDecorrelation, feature_decorrelation_terms
from lightning_collapse.losses.effective_rank import EffectiveRankHinge, effective_rank_terms
from lightning_collapse.losses.koleo import KoLeo, koleo_loss
from lightning_collapse.losses.ldreg import LDReg, ldreg_loss
from lightning_collapse.losses.log_det import LogDetBarrier, log_det_barrier
from lightning_collapse.losses.schedule import LinearWarmup
from lightning_collapse.losses.tregs import TREGS, tregs_terms
from lightning_collapse.losses.variance import VarianceLoss, variance_loss
from lightning_collapse.losses.vicreg import VICReg, vicreg_terms

__all__ = [
    "TREGS",
    "AntiCollapseLoss",
    "CovarianceLoss",
    "EffectiveRankHinge",
    "FeatureDecorrelation",
    "KoLeo",
    "LDReg",
    "LinearWarmup",
    "LogDetBarrier",
    "TooFewRowsError",
    "VICReg",
    "VarianceLoss",
    "covariance_loss",
    "effective_rank_terms",
    "feature_decorrelation_terms",
    "koleo_loss",
    "ldreg_loss",
    "log_det_barrier",
    "tregs_terms",
    "variance_loss",
    "vicreg_terms",
]
