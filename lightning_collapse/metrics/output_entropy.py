"""Entropy of the outputs of a softmax, streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.output_entropy import BINS, output_readings, output_rows, output_sums
from lightning_collapse.metrics.sums import SumsMetric


class OutputEntropy(SumsMetric):
    """Mean entropy of the softmax of every row of logits seen since the last reset, and what goes with it.

    Sums and a histogram: memory does not grow, uneven batches weigh right, and ``compute`` gives every process the mean
    over the rows of all of them. Logits are read in ``float32``, 1024 rows at a time; rows with NaN or plus infinity
    are left out and counted.

    As input to ``update``: the arguments of :func:`~lightning_collapse.functional.output_rows`, and a mask.

    As output of ``compute``, a dictionary of 0-dimensional tensors:

    - ``entropy`` in nats, its standard ``error``, ``entropy_fraction`` of ``log V``, ``log_z``, ``log_z_rms``,
      ``cross_entropy`` of the targets, and ``n`` rows.

    Args:
        vocabulary: Number of outputs ``V``.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Attributes:
        sums: What :func:`~lightning_collapse.functional.output_entropy.output_sums` returns, over all rows.
        nonfinite: Rows of this process that were left out.
        histogram: How many of its entropies over ``log V`` lie in each of 32 bins between 0 and 1, shape ``(32,)``.

    Raises:
        ValueError: If there are fewer than two outputs; in ``update``, if the shapes do not fit.

    Example:
        >>> metric = OutputEntropy(vocabulary=4)
        >>> metric.update(torch.zeros(2, 3, 4))
        >>> round(metric.compute()["entropy_fraction"].item(), 6)
        1.0
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    sums: Tensor

    def __init__(self, vocabulary: int, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if vocabulary < 2:
            raise ValueError(f"`vocabulary` must be at least 2, got {vocabulary}.")
        self.vocabulary = vocabulary
        self.add_state("sums", torch.zeros(8 + BINS, dtype=dtype), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add rows of logits ``(..., V)``, with targets and a boolean mask ``(...)``."""
        if logits.shape[-1] != self.vocabulary:
            raise ValueError(f"`logits` has {logits.shape[-1]} outputs, but `vocabulary` is {self.vocabulary}.")
        sums = output_sums(output_rows(logits.detach(), targets), self.vocabulary, mask)
        self.sums = self.sums + sums.to(self.sums)

    def compute(self) -> dict[str, Tensor]:
        """Means over everything seen so far."""
        found = output_readings(self.sums, self.vocabulary)
        return {name: value for name, value in found.items() if name not in ("nonfinite", "histogram")}

    @property
    def nonfinite(self) -> Tensor:
        """Rows of this process that were left out, 0-dimensional."""
        return output_readings(self.sums, self.vocabulary)["nonfinite"]

    @property
    def histogram(self) -> Tensor:
        """Entropies over ``log V``, counted in bins."""
        return output_readings(self.sums, self.vocabulary)["histogram"]
