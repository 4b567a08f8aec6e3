"""Continual learning: penalties on weights that old tasks need, and the estimates of that need."""

from lightning_collapse.penalties.base import Penalty

__all__ = ["Penalty"]
