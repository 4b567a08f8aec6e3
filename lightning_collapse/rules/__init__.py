"""What counts as a failure: one rule per verdict, without Lightning."""

from lightning_collapse.rules.attention import AttentionEntropyCollapse, AttentionOverload
from lightning_collapse.rules.base import ALL, HEALTHY, RULES, Rule, register_rule
from lightning_collapse.rules.collapse import CompleteCollapse, DimensionalCollapse
from lightning_collapse.rules.explosion import LossExplosion
from lightning_collapse.rules.neural_collapse import MinorityCollapse, NeuralCollapseReached
from lightning_collapse.rules.regression import RegressionOverCompression

__all__ = [
    "ALL",
    "HEALTHY",
    "RULES",
    "AttentionEntropyCollapse",
    "AttentionOverload",
    "CompleteCollapse",
    "DimensionalCollapse",
    "LossExplosion",
    "MinorityCollapse",
    "NeuralCollapseReached",
    "RegressionOverCompression",
    "Rule",
    "register_rule",
]
