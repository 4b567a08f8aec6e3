"""Samples that contribute to the gradient, streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.tail_learning.contributing import (
    OCTAVES,
    PER_OCTAVE,
    SUMS,
    contribution_readings,
    contribution_sums,
)
from lightning_collapse.metrics.sums import SumsMetric


class ContributingSamples(SumsMetric):
    """:func:`~lightning_collapse.functional.tail_learning.contributing_samples` of everything since the last reset.

    Sums and a histogram: memory does not grow, and ``compute`` gives every process the values over the samples of all.

    As input to ``update``: ``logits`` and ``labels`` as there. As output of ``compute``: the dictionary it returns.

    Args:
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Attributes:
        sums: What the readings are made of.

    Raises:
        ValueError: In ``update``, if the shapes do not fit or the labels are not integers.

    Example:
        >>> metric = ContributingSamples()
        >>> metric.update(torch.tensor([[0.0, 0.0], [0.0, -30.0]]), torch.tensor([0, 0]))
        >>> round(metric.compute()["effective_fraction"].item(), 3)  # one of two
        0.5
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    sums: Tensor

    def __init__(self, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(SUMS + 2 * PER_OCTAVE * OCTAVES, dtype=dtype)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits ``(..., C)`` and labels ``(...)``."""
        self.sums = self.sums + contribution_sums(logits.detach(), labels).to(self.sums)

    def compute(self) -> dict[str, Tensor]:
        """Readings over everything seen so far."""
        return contribution_readings(self.sums)
