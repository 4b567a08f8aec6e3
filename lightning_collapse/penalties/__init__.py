"""Continual learning: penalties on weights that old tasks need, and the estimates of that need."""

from lightning_collapse.penalties.base import Penalty
from lightning_collapse.penalties.diagonal_fisher import DiagonalFisher, diagonal_fisher
from lightning_collapse.penalties.evaluating import evaluating
from lightning_collapse.penalties.kronecker_factors import KroneckerFactor, KroneckerFactors, kronecker_factors
from lightning_collapse.penalties.mas_importance import MASImportance, mas_importance
from lightning_collapse.penalties.rank_one_fisher import RankOneFisher, rank_one_fisher

__all__ = [
    "DiagonalFisher",
    "KroneckerFactor",
    "KroneckerFactors",
    "MASImportance",
    "Penalty",
    "RankOneFisher",
    "diagonal_fisher",
    "evaluating",
    "kronecker_factors",
    "mas_importance",
    "rank_one_fisher",
]
