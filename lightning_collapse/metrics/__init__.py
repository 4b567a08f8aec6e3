"""``torchmetrics.Metric`` forms: streaming sufficient statistics in, a measure out."""

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
from lightning_collapse.metrics.spectrum import Spectrum

__all__ = [
    "AlphaReQ",
    "ConditionNumber",
    "EffectiveRank",
    "EigenvalueEffectiveRank",
    "Isotropy",
    "NESum",
    "NumericalRank",
    "ParticipationRatio",
    "RankMe",
    "SRank",
    "SpectralMetric",
    "Spectrum",
    "StableRank",
    "UnbiasedParticipationRatio",
]
