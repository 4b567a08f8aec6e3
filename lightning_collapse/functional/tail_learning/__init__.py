"""Tail learning: which samples, classes and tokens still teach, and which stay behind."""

from lightning_collapse.functional.tail_learning.contributing import contributing_samples
from lightning_collapse.functional.tail_learning.frequency import loss_by_frequency

__all__ = ["contributing_samples", "loss_by_frequency"]
