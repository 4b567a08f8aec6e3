"""Lightning callbacks: one line in a ``Trainer``."""

from lightning_collapse.callbacks.collapse_monitor import CollapseMonitor
from lightning_collapse.callbacks.monitor import Monitor

__all__ = ["CollapseMonitor", "Monitor"]
