"""Continual learning: penalties on weights that old tasks need, and the estimates of that need."""

from lightning_collapse.penalties.base import Penalty
from lightning_collapse.penalties.diagonal_fisher import DiagonalFisher, diagonal_fisher
from lightning_collapse.penalties.ewc import EWC
from lightning_collapse.penalties.kfac_ewc import KFACEWC
from lightning_collapse.penalties.kronecker_factors import KroneckerFactor, KroneckerFactors, kronecker_factors
from lightning_collapse.penalties.l2_init import L2Init
from lightning_collapse.penalties.l2_sp import L2SP
from lightning_collapse.penalties.mas import MAS
from lightning_collapse.penalties.mas_importance import MASImportance, mas_importance
from lightning_collapse.penalties.rank_one_ewc import RankOneEWC
from lightning_collapse.penalties.rank_one_fisher import RankOneFisher, rank_one_fisher
from lightning_collapse.penalties.rwalk import RWalk
from lightning_collapse.penalties.soft_orthogonality import SoftOrthogonality, published_decay
from lightning_collapse.penalties.synaptic_intelligence import SynapticIntelligence
from lightning_collapse.utilities.preserved_state import preserved_state

evaluating = preserved_state
"""The name of :func:`preserved_state` in version 0.1.0."""

__all__ = [
    "EWC",
    "KFACEWC",
    "L2SP",
    "MAS",
    "DiagonalFisher",
    "KroneckerFactor",
    "KroneckerFactors",
    "L2Init",
    "MASImportance",
    "Penalty",
    "RWalk",
    "RankOneEWC",
    "RankOneFisher",
    "SoftOrthogonality",
    "SynapticIntelligence",
    "diagonal_fisher",
    "evaluating",
    "kronecker_factors",
    "mas_importance",
    "preserved_state",
    "published_decay",
    "rank_one_fisher",
]
