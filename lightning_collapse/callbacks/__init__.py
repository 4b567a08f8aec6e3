"""Lightning callbacks: one line in a ``Trainer``."""

from lightning_collapse.callbacks.constraints.constraint import Constraint
from lightning_collapse.callbacks.constraints.max_norm import MaxNorm
from lightning_collapse.callbacks.constraints.parseval_step import ParsevalStep
from lightning_collapse.callbacks.constraints.projection import Projection
from lightning_collapse.callbacks.continual.consolidate_update import ConsolidateUpdate
from lightning_collapse.callbacks.continual.continual_metrics import ContinualMetrics
from lightning_collapse.callbacks.continual.curve_jump import CurveJump
from lightning_collapse.callbacks.continual.dynamic_ema import DynamicEMA
from lightning_collapse.callbacks.continual.fit_tasks import fit_tasks
from lightning_collapse.callbacks.continual.forgetting_monitor import ForgettingMonitor
from lightning_collapse.callbacks.continual.fpf import FPF
from lightning_collapse.callbacks.continual.prototype_memory import PrototypeMemory
from lightning_collapse.callbacks.continual.replay import Replay
from lightning_collapse.callbacks.continual.shrink_and_perturb import ShrinkAndPerturb
from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.continual.task_boundary import TaskBoundary
from lightning_collapse.callbacks.guard.action import Action
from lightning_collapse.callbacks.guard.collapse_guard import CollapseGuard
from lightning_collapse.callbacks.guard.rollback import Rollback
from lightning_collapse.callbacks.guard.skip_step import SkipStep
from lightning_collapse.callbacks.guard.switch_on import SwitchOn
from lightning_collapse.callbacks.loss_terms.distillation import Distillation
from lightning_collapse.callbacks.loss_terms.qk_clip import QKClip
from lightning_collapse.callbacks.loss_terms.regularizer import Regularizer
from lightning_collapse.callbacks.loss_terms.sigma_reparam_update import SigmaReparamUpdate
from lightning_collapse.callbacks.loss_terms.weight_penalty import WeightPenalty
from lightning_collapse.callbacks.monitors.activation_monitor import ActivationMonitor
from lightning_collapse.callbacks.monitors.attention_entropy_monitor import AttentionEntropyMonitor
from lightning_collapse.callbacks.monitors.attention_gain_monitor import AttentionGainMonitor
from lightning_collapse.callbacks.monitors.attention_logit_monitor import AttentionLogitMonitor
from lightning_collapse.callbacks.monitors.codebook_monitor import CodebookMonitor
from lightning_collapse.callbacks.monitors.collapse_monitor import CollapseMonitor
from lightning_collapse.callbacks.monitors.drift_monitor import DriftMonitor
from lightning_collapse.callbacks.monitors.feature_learning_monitor import FeatureLearningMonitor
from lightning_collapse.callbacks.monitors.first_non_finite import FirstNonFinite
from lightning_collapse.callbacks.monitors.geometry_phase_monitor import GeometryPhaseMonitor
from lightning_collapse.callbacks.monitors.gradient_monitor import GradientMonitor
from lightning_collapse.callbacks.monitors.intrinsic_dimension_monitor import IntrinsicDimensionMonitor
from lightning_collapse.callbacks.monitors.labelled_geometry_monitor import LabelledGeometryMonitor
from lightning_collapse.callbacks.monitors.latent_monitor import LatentMonitor
from lightning_collapse.callbacks.monitors.monitor import Monitor
from lightning_collapse.callbacks.monitors.neural_collapse_monitor import NeuralCollapseMonitor
from lightning_collapse.callbacks.monitors.output_monitor import OutputMonitor
from lightning_collapse.callbacks.monitors.plasticity_monitor import PlasticityMonitor
from lightning_collapse.callbacks.monitors.regression_collapse_monitor import RegressionCollapseMonitor
from lightning_collapse.callbacks.monitors.router_monitor import RouterMonitor
from lightning_collapse.callbacks.monitors.scalar_monitor import ScalarMonitor
from lightning_collapse.callbacks.monitors.spectral_alignment_monitor import SpectralAlignmentMonitor
from lightning_collapse.callbacks.monitors.stability_monitor import StabilityMonitor
from lightning_collapse.callbacks.monitors.state_monitor import StateMonitor
from lightning_collapse.callbacks.monitors.token_monitor import TokenMonitor
from lightning_collapse.callbacks.monitors.update_monitor import UpdateMonitor
from lightning_collapse.callbacks.monitors.variance_propagation_monitor import VariancePropagationMonitor
from lightning_collapse.callbacks.monitors.weight_spectrum_monitor import WeightSpectrumMonitor
from lightning_collapse.rules import Verdict

__all__ = [
    "FPF",
    "Action",
    "ActivationMonitor",
    "AttentionEntropyMonitor",
    "AttentionGainMonitor",
    "AttentionLogitMonitor",
    "CodebookMonitor",
    "CollapseGuard",
    "CollapseMonitor",
    "ConsolidateUpdate",
    "Constraint",
    "ContinualMetrics",
    "CurveJump",
    "Distillation",
    "DriftMonitor",
    "DynamicEMA",
    "FeatureLearningMonitor",
    "FirstNonFinite",
    "ForgettingMonitor",
    "GeometryPhaseMonitor",
    "GradientMonitor",
    "IntrinsicDimensionMonitor",
    "LabelledGeometryMonitor",
    "LatentMonitor",
    "MaxNorm",
    "Monitor",
    "NeuralCollapseMonitor",
    "OutputMonitor",
    "ParsevalStep",
    "PlasticityMonitor",
    "Projection",
    "PrototypeMemory",
    "QKClip",
    "RegressionCollapseMonitor",
    "Regularizer",
    "Replay",
    "Rollback",
    "RouterMonitor",
    "ScalarMonitor",
    "ShrinkAndPerturb",
    "SigmaReparamUpdate",
    "SkipStep",
    "SpectralAlignmentMonitor",
    "StabilityMonitor",
    "StateMonitor",
    "SwitchOn",
    "TaskAware",
    "TaskBoundary",
    "TokenMonitor",
    "UpdateMonitor",
    "VariancePropagationMonitor",
    "Verdict",
    "WeightPenalty",
    "WeightSpectrumMonitor",
    "fit_tasks",
]
