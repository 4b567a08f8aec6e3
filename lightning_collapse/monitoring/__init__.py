"""The engine under every monitor: hooks, sampling plan, feature buffer, evaluation of measures; no Lightning in it."""

from lightning_collapse.monitoring.attention_hooks import AttentionTaps
from lightning_collapse.monitoring.feature_hooks import RowTaps
from lightning_collapse.monitoring.training_flops import TrainingFlops

__all__ = ["AttentionTaps", "RowTaps", "TrainingFlops"]
