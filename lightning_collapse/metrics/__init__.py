"""Streaming metrics: ``torchmetrics.Metric`` forms, sufficient statistics in, a measure out."""

from lightning_collapse.metrics.activation_outliers import ActivationOutliers
from lightning_collapse.metrics.attention_entropy import AttentionEntropy
from lightning_collapse.metrics.class_loss import ClassLoss
from lightning_collapse.metrics.class_prototypes import ClassPrototypes
from lightning_collapse.metrics.codebook_usage import CodebookUsage
from lightning_collapse.metrics.contributing_samples import ContributingSamples
from lightning_collapse.metrics.intrinsic_dimension import IntrinsicDimension
from lightning_collapse.metrics.latent_units import LatentUnits
from lightning_collapse.metrics.lidar import LiDAR
from lightning_collapse.metrics.linear_probe import LinearProbe
from lightning_collapse.metrics.nearest_center import NearestClassCenterAgreement
from lightning_collapse.metrics.neural_collapse import NeuralCollapse
from lightning_collapse.metrics.nuisance_shares import NuisanceShares
from lightning_collapse.metrics.output_entropy import OutputEntropy
from lightning_collapse.metrics.rank import (
    AlphaReQ,
    ConditionNumber,
    EffectiveRank,
    EigenvalueEffectiveRank,
    Isotropy,
    NESum,
    NumericalRank,
    ParticipationRatio,
    RankMe,
    SpectralMetric,
    SRank,
    StableRank,
    UnbiasedParticipationRatio,
)
from lightning_collapse.metrics.regression_collapse import RegressionCollapse
from lightning_collapse.metrics.router_load import RouterLoad
from lightning_collapse.metrics.spectral_alignment import SpectralAlignment
from lightning_collapse.metrics.spectrum import Spectrum

__all__ = [
    "ActivationOutliers",
    "AlphaReQ",
    "AttentionEntropy",
    "ClassLoss",
    "ClassPrototypes",
    "CodebookUsage",
    "ConditionNumber",
    "ContributingSamples",
    "EffectiveRank",
    "EigenvalueEffectiveRank",
    "IntrinsicDimension",
    "Isotropy",
    "LatentUnits",
    "LiDAR",
    "LinearProbe",
    "NESum",
    "NearestClassCenterAgreement",
    "NeuralCollapse",
    "NuisanceShares",
    "NumericalRank",
    "OutputEntropy",
    "ParticipationRatio",
    "RankMe",
    "RegressionCollapse",
    "RouterLoad",
    "SRank",
    "SpectralAlignment",
    "SpectralMetric",
    "Spectrum",
    "StableRank",
    "UnbiasedParticipationRatio",
]
