"""Optimizers that leave the weights of earlier tasks alone."""

from lightning_collapse.optimizers.classp import CLASSP

__all__ = ["CLASSP"]
