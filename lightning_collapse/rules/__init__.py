"""Rules of failure: one per verdict, and the judge that applies them to points; without Lightning."""

from lightning_collapse.rules.activations import ActivationOutliers, Headroom
from lightning_collapse.rules.attention import AttentionEntropyCollapse, AttentionOverload
from lightning_collapse.rules.base import ALL, HEALTHY, RULES, DetectorRule, Rule, register_rule
from lightning_collapse.rules.burst import Burst
from lightning_collapse.rules.codebook import CodebookCollapse
from lightning_collapse.rules.collapse import CompleteCollapse, DimensionalCollapse
from lightning_collapse.rules.coverage import Coverage
from lightning_collapse.rules.detector import Detector
from lightning_collapse.rules.explosion import LossExplosion
from lightning_collapse.rules.forgetting import CatastrophicForgetting
from lightning_collapse.rules.history import TRAINING
from lightning_collapse.rules.judge import Judge, Judgement
from lightning_collapse.rules.latents import PointCollapse, PosteriorCollapse
from lightning_collapse.rules.layer_collapse import LayerCollapse
from lightning_collapse.rules.level_shift import LevelShift
from lightning_collapse.rules.neural_collapse import MinorityCollapse, NeuralCollapseReached
from lightning_collapse.rules.non_finite import NonFinite, NonFiniteOrigin
from lightning_collapse.rules.outcome import MODES, OUTCOME, Outcome, OutcomeDrop
from lightning_collapse.rules.output import LogPartitionGrowth, OutputEntropyCollapse, PredictionCollapse
from lightning_collapse.rules.partial import PartialCollapse, PrototypeCollapse
from lightning_collapse.rules.plasticity import PlasticityLoss
from lightning_collapse.rules.regression import RegressionOverCompression
from lightning_collapse.rules.router import RouterCollapse
from lightning_collapse.rules.stability import DivergenceAhead, LossSpike, NonFiniteStep, SkippedSteps
from lightning_collapse.rules.states import StateCollapse
from lightning_collapse.rules.step_stream import Step, StepStream
from lightning_collapse.rules.task import TASKS, Task
from lightning_collapse.rules.tokens import TokenCollapse
from lightning_collapse.rules.trend import Trend
from lightning_collapse.rules.verdict import Verdict
from lightning_collapse.rules.verdict_grouper import VerdictGrouper

__all__ = [
    "ALL",
    "HEALTHY",
    "MODES",
    "OUTCOME",
    "RULES",
    "TASKS",
    "TRAINING",
    "ActivationOutliers",
    "AttentionEntropyCollapse",
    "AttentionOverload",
    "Burst",
    "CatastrophicForgetting",
    "CodebookCollapse",
    "CompleteCollapse",
    "Coverage",
    "Detector",
    "DetectorRule",
    "DimensionalCollapse",
    "DivergenceAhead",
    "Headroom",
    "Judge",
    "Judgement",
    "LayerCollapse",
    "LevelShift",
    "LogPartitionGrowth",
    "LossExplosion",
    "LossSpike",
    "MinorityCollapse",
    "NeuralCollapseReached",
    "NonFinite",
    "NonFiniteOrigin",
    "NonFiniteStep",
    "Outcome",
    "OutcomeDrop",
    "OutputEntropyCollapse",
    "PartialCollapse",
    "PlasticityLoss",
    "PointCollapse",
    "PosteriorCollapse",
    "PredictionCollapse",
    "PrototypeCollapse",
    "RegressionOverCompression",
    "RouterCollapse",
    "Rule",
    "SkippedSteps",
    "StateCollapse",
    "Step",
    "StepStream",
    "Task",
    "TokenCollapse",
    "Trend",
    "Verdict",
    "VerdictGrouper",
    "register_rule",
]
