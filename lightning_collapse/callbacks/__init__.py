"""Lightning callbacks: one line in a ``Trainer``."""

from lightning_collapse.callbacks.attention_entropy_monitor import AttentionEntropyMonitor
from lightning_collapse.callbacks.collapse_guard import CollapseGuard
from lightning_collapse.callbacks.collapse_monitor import CollapseMonitor
from lightning_collapse.callbacks.continual_metrics import ContinualMetrics
from lightning_collapse.callbacks.distillation import Distillation
from lightning_collapse.callbacks.fit_tasks import fit_tasks
from lightning_collapse.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_collapse.callbacks.geometry_phase_monitor import GeometryPhaseMonitor
from lightning_collapse.callbacks.gradient_monitor import GradientMonitor
from lightning_collapse.callbacks.intrinsic_dimension_monitor import IntrinsicDimensionMonitor
from lightning_collapse.callbacks.monitor import Monitor
from lightning_collapse.callbacks.neural_collapse_monitor import NeuralCollapseMonitor
from lightning_collapse.callbacks.plasticity_monitor import PlasticityMonitor
from lightning_collapse.callbacks.regression_collapse_monitor import RegressionCollapseMonitor
from lightning_collapse.callbacks.regularizer import Regularizer
from lightning_collapse.callbacks.rollback import Rollback
from lightning_collapse.callbacks.shrink_and_perturb import ShrinkAndPerturb
from lightning_collapse.callbacks.spectral_alignment_monitor import SpectralAlignmentMonitor
from lightning_collapse.callbacks.switch_on import SwitchOn
from lightning_collapse.callbacks.task_aware import TaskAware
from lightning_collapse.callbacks.task_boundary import TaskBoundary
from lightning_collapse.callbacks.weight_spectrum_monitor import WeightSpectrumMonitor
from lightning_collapse.rules import Verdict

__all__ = [
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
    "Verdict",
    "WeightSpectrumMonitor",
    "fit_tasks",
]
