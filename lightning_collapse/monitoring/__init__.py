"""The engine under every monitor: hooks, sampling plan, feature buffer, evaluation of measures; no Lightning in it."""

from lightning_collapse.monitoring.attention_hooks import AttentionHooks
from lightning_collapse.monitoring.attention_maps import attention_maps
from lightning_collapse.monitoring.call_record import CallRecord
from lightning_collapse.monitoring.codebooks import Codebooks
from lightning_collapse.monitoring.execution_order import ExecutionOrder
from lightning_collapse.monitoring.feature_hooks import FeatureHooks
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.monitoring.layer_points import read_points
from lightning_collapse.monitoring.loss_graph import read_loss
from lightning_collapse.monitoring.loss_use import LossUse
from lightning_collapse.monitoring.neco import NecoReading, PrincipalSubspace, neco, principal_subspace
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.monitoring.step_signals import StepSignals
from lightning_collapse.monitoring.training_flops import TrainingFlops

__all__ = [
    "AttentionHooks",
    "CallRecord",
    "Codebooks",
    "ExecutionOrder",
    "FeatureHooks",
    "FeatureWindow",
    "LossUse",
    "NecoReading",
    "PrincipalSubspace",
    "StepScope",
    "StepSignals",
    "TrainingFlops",
    "attention_maps",
    "neco",
    "principal_subspace",
    "read_loss",
    "read_points",
]
