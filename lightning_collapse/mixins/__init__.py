"""Mixins to put in front of ``LightningModule``."""

from lightning_collapse.mixins.anti_collapse import AntiCollapseMixin

__all__ = ["AntiCollapseMixin"]
