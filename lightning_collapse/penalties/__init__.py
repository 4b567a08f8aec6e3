"""Continual learning: penalties on weights that old tasks need, and the estimates of that need."""

from lightning_collapse.penalties.base import Penalty
from lightning_collapse.penalties.diagonal_fisher import DiagonalFisher, diagonal_fisher
from lightning_collapse.penalties.evaluating import evaluating
from lightning_collapse.penalties.mas_importance import MASImportance, mas_importance

__all__ = ["DiagonalFisher", "MASImportance", "Penalty", "diagonal_fisher", "evaluating", "mas_importance"]
