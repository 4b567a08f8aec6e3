"""See and stop representation collapse in PyTorch Lightning with one line in a ``Trainer``."""

from lightning_collapse.callbacks import (
    AttentionEntropyMonitor,
    CollapseGuard,
    CollapseMonitor,
    ContinualMetrics,
    Distillation,
    ForgettingMonitor,
    GeometryPhaseMonitor,
    GradientMonitor,
    IntrinsicDimensionMonitor,
    Monitor,
    NeuralCollapseMonitor,
    PlasticityMonitor,
    RegressionCollapseMonitor,
    Regularizer,
    Rollback,
    ShrinkAndPerturb,
    SpectralAlignmentMonitor,
    SwitchOn,
    TaskAware,
    TaskBoundary,
    WeightSpectrumMonitor,
    fit_tasks,
)
from lightning_collapse.mixins import AntiCollapseMixin
from lightning_collapse.utilities.registry import register_measure

__version__ = "0.1.0.dev0"

__all__ = [
    "AntiCollapseMixin",
    "AttentionEntropyMonitor",
    "CollapseGuard",
    "CollapseMonitor",
    "ContinualMetrics",
    "Distillation",
    "ForgettingMonitor",
    "GeometryPhaseMonitor",
    "GradientMonitor",
    "IntrinsicDimensionMonitor",
    "Monitor",
    "NeuralCollapseMonitor",
    "PlasticityMonitor",
    "RegressionCollapseMonitor",
    "Regularizer",
    "Rollback",
    "ShrinkAndPerturb",
    "SpectralAlignmentMonitor",
    "SwitchOn",
    "TaskAware",
    "TaskBoundary",
    "WeightSpectrumMonitor",
    "fit_tasks",
    "register_measure",
]
