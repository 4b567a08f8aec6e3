"""Mixins to put in front of ``LightningModule``."""

from lightning_collapse.mixins.anti_collapse import AntiCollapseMixin
from lightning_collapse.mixins.continual import ContinualMixin, EWCMixin

__all__ = ["AntiCollapseMixin", "ContinualMixin", "EWCMixin"]
