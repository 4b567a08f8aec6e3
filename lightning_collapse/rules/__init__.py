"""What counts as a failure: one rule per verdict, without Lightning."""

from lightning_collapse.rules.base import ALL, HEALTHY, RULES, Rule, register_rule
from lightning_collapse.rules.collapse import CompleteCollapse, DimensionalCollapse

__all__ = ["ALL", "HEALTHY", "RULES", "CompleteCollapse", "DimensionalCollapse", "Rule", "register_rule"]
