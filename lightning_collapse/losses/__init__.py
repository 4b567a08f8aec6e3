"""Anti-collapse losses: a function and its module each, exact in data-parallel training and in any precision."""

from lightning_collapse.losses.alignment import Alignment, alignment_loss
from lightning_collapse.losses.balanced_softmax import BalancedSoftmax, balanced_cross_entropy
from lightning_collapse.losses.barlow_twins import BarlowTwins, barlow_twins_terms
from lightning_collapse.losses.base import AntiCollapseLoss, TooFewRowsError
from lightning_collapse.losses.coding_rate import CodingRate, coding_rate_loss
from lightning_collapse.losses.conr import ConR, conr_loss
from lightning_collapse.losses.consistency import flip_consistency, interpolation_consistency
from lightning_collapse.losses.corinfomax import CorInfoMax, corinfomax_terms
from lightning_collapse.losses.covariance import CovarianceLoss, covariance_loss
from lightning_collapse.losses.cw_rgp import CWRGP, cw_rgp_loss
from lightning_collapse.losses.dcca import DCCA, canonical_correlations, dcca_loss
from lightning_collapse.losses.decorrelation import FeatureDecorrelation, feature_decorrelation_terms
from lightning_collapse.losses.deep_svdd import DeepSVDD, svdd_scores
from lightning_collapse.losses.delta_vae import DeltaVAE, ar1_divergence, committed_rate
from lightning_collapse.losses.distillation import (
    distillation_loss,
    feature_distillation_loss,
    squared_distillation_loss,
)
from lightning_collapse.losses.dot_regression import DotRegression, dot_regression
from lightning_collapse.losses.effective_rank import EffectiveRankHinge, effective_rank_terms
from lightning_collapse.losses.entropy_guided_attention import EntropyGuidedAttention
from lightning_collapse.losses.focal_preference import FocalPreference, focal_preference_loss
from lightning_collapse.losses.free_bits import FreeBits, free_bits
from lightning_collapse.losses.group_entropy import GroupEntropy, group_entropy_terms
from lightning_collapse.losses.ha_frame import HAFrameLoss
from lightning_collapse.losses.info_nce import InfoNCE, info_nce_loss
from lightning_collapse.losses.intl import INTL, intl_terms
from lightning_collapse.losses.jacobian_homeostasis import JacobianHomeostasis
from lightning_collapse.losses.kl_balance import KLBalance, kl_balance_terms
from lightning_collapse.losses.koleo import KoLeo, koleo_loss
from lightning_collapse.losses.ldreg import LDReg, ldreg_loss
from lightning_collapse.losses.log_det import LogDetBarrier, log_det_barrier
from lightning_collapse.losses.logit_distillation import logit_distillation_loss
from lightning_collapse.losses.long_tail_collapse import LongTailCollapse, long_tail_collapse_terms
from lightning_collapse.losses.max_sup import MaxSup, label_smoothing_terms, max_suppression
from lightning_collapse.losses.midpoint_mixup import midpoint_mixup, mixup_cross_entropy
from lightning_collapse.losses.mmcr import MMCR, mmcr_terms
from lightning_collapse.losses.pair_weights import PairWeights
from lightning_collapse.losses.schedule import LinearRamp, LinearWarmup
from lightning_collapse.losses.sdc import SDC, hash_code_readings, sdc_terms
from lightning_collapse.losses.sigreg import SIGReg, sigreg_loss
from lightning_collapse.losses.spectral_decoupling import SpectralDecoupling, spectral_decoupling
from lightning_collapse.losses.spectral_transformation import SpectralTransformation, spectral_transformation_terms
from lightning_collapse.losses.spread import SpreadLoss, spread_terms
from lightning_collapse.losses.sup_con import SupCon, sup_con_terms
from lightning_collapse.losses.token_relations import (
    TokenRelationDistillation,
    token_relation_terms,
)
from lightning_collapse.losses.tregs import TREGS, tregs_terms
from lightning_collapse.losses.triplet import BatchHardTriplet, batch_hard_triplet
from lightning_collapse.losses.uniformity import Uniformity, uniformity_loss
from lightning_collapse.losses.variance import VarianceLoss, variance_loss
from lightning_collapse.losses.vbll import VBLL
from lightning_collapse.losses.vcreg import VCReg, vcreg_terms
from lightning_collapse.losses.vicreg import VICReg, vicreg_terms
from lightning_collapse.losses.visreg import VISReg, visreg_terms
from lightning_collapse.losses.wmse import WMSE, wmse_loss

__all__ = [
    "CWRGP",
    "DCCA",
    "INTL",
    "MMCR",
    "SDC",
    "TREGS",
    "VBLL",
    "WMSE",
    "Alignment",
    "AntiCollapseLoss",
    "BalancedSoftmax",
    "BarlowTwins",
    "BatchHardTriplet",
    "CodingRate",
    "ConR",
    "CorInfoMax",
    "CovarianceLoss",
    "DeepSVDD",
    "DeltaVAE",
    "DotRegression",
    "EffectiveRankHinge",
    "EntropyGuidedAttention",
    "FeatureDecorrelation",
    "FocalPreference",
    "FreeBits",
    "GroupEntropy",
    "HAFrameLoss",
    "InfoNCE",
    "JacobianHomeostasis",
    "KLBalance",
    "KoLeo",
    "LDReg",
    "LinearRamp",
    "LinearWarmup",
    "LogDetBarrier",
    "LongTailCollapse",
    "MaxSup",
    "PairWeights",
    "SIGReg",
    "SpectralDecoupling",
    "SpectralTransformation",
    "SpreadLoss",
    "SupCon",
    "TokenRelationDistillation",
    "TooFewRowsError",
    "Uniformity",
    "VCReg",
    "VICReg",
    "VISReg",
    "VarianceLoss",
    "alignment_loss",
    "ar1_divergence",
    "balanced_cross_entropy",
    "barlow_twins_terms",
    "batch_hard_triplet",
    "canonical_correlations",
    "coding_rate_loss",
    "committed_rate",
    "conr_loss",
    "corinfomax_terms",
    "covariance_loss",
    "cw_rgp_loss",
    "dcca_loss",
    "distillation_loss",
    "dot_regression",
    "effective_rank_terms",
    "feature_decorrelation_terms",
    "feature_distillation_loss",
    "flip_consistency",
    "focal_preference_loss",
    "free_bits",
    "group_entropy_terms",
    "hash_code_readings",
    "info_nce_loss",
    "interpolation_consistency",
    "intl_terms",
    "kl_balance_terms",
    "koleo_loss",
    "label_smoothing_terms",
    "ldreg_loss",
    "log_det_barrier",
    "logit_distillation_loss",
    "long_tail_collapse_terms",
    "max_suppression",
    "midpoint_mixup",
    "mixup_cross_entropy",
    "mmcr_terms",
    "sdc_terms",
    "sigreg_loss",
    "spectral_decoupling",
    "spectral_transformation_terms",
    "spread_terms",
    "squared_distillation_loss",
    "sup_con_terms",
    "svdd_scores",
    "token_relation_terms",
    "tregs_terms",
    "uniformity_loss",
    "variance_loss",
    "vcreg_terms",
    "vicreg_terms",
    "visreg_terms",
    "wmse_loss",
]
