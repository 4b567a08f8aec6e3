"""See and stop representation collapse in PyTorch Lightning with one line in a ``Trainer``."""

from lightning_collapse.callbacks import CollapseMonitor, Monitor

__version__ = "0.1.0.dev0"
