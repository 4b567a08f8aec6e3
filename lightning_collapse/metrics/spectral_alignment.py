"""Spectral alignment, streaming: counts of signs that add up over batches, processes and a resume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.spectral_alignment import cosines, diversity_of_counts, sign_counts
from lightning_collapse.metrics.sums import SumsMetric
from lightning_collapse.spectral.precision import full_precision

BINS = 41
"""Bins of the histogram over [-1, 1]; an odd number, so that balanced values have a bin of their own in the middle."""


class SpectralAlignment(SumsMetric):
    r"""Sign diversity of the alignment of all inputs seen since the last reset with a direction.

    See :func:`~lightning_collapse.functional.spectral_alignment`. The direction is given with every batch, since the
    weights move between batches; all states are sums, so any split of the inputs that keeps the directions gives the
    same value, and processes add up.

    As input to ``update``:

    - ``inputs`` (:class:`~torch.Tensor`): What the matrix multiplies, shape ``(N, dim)``, any floating dtype; rows with
      NaN or infinity do not count.
    - ``direction`` (:class:`~torch.Tensor`): Unit vector, shape ``(dim,)``: the matrix's top right singular vector.

    As output of ``compute``:

    - ``sign_diversity`` (:class:`~torch.Tensor`): Scalar, 0 (all inputs on one side) to 1 (balanced), NaN for none.

    Args:
        dim: Width of the inputs.
        center: Align inputs less the mean of their own batch; then the split into batches matters.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dim`` is not positive; in ``update``, if a shape does not fit.

    Example:
        >>> metric = SpectralAlignment(dim=2)
        >>> metric.update(torch.tensor([[1.0, 2.0], [-3.0, 1.0], [2.0, 0.0], [5.0, 1.0]]), torch.tensor([1.0, 0.0]))
        >>> metric.compute(), metric.majority_fraction
        (tensor(0.5000), tensor(0.7500))
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    positive: Tensor
    negative: Tensor
    zero: Tensor
    histogram: Tensor
    total: Tensor
    squares: Tensor
    energy: Tensor
    input_total: Tensor

    def __init__(self, dim: int, center: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"`dim` is the width of the inputs and must be positive, got {dim}.")
        self.dim = dim
        self.center = center
        for name in ("positive", "negative", "zero"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(BINS, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("total", "squares", "energy"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("input_total", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")

    @full_precision
    def update(self, inputs: Tensor, direction: Tensor) -> None:
        """Add inputs ``(N, dim)`` and the direction ``(dim,)`` that holds for them."""
        if inputs.ndim != 2 or inputs.shape[1] != self.dim or direction.shape != (self.dim,):
            raise ValueError(
                f"Expected `inputs` of shape (N, {self.dim}) and `direction` of shape ({self.dim},), got"
                f" {tuple(inputs.shape)} and {tuple(direction.shape)}."
            )
        finite = torch.linalg.vector_norm(inputs, dim=1).isfinite()
        rows = torch.where(finite.unsqueeze(1), inputs, 0.0)
        self.energy = self.energy + rows.to(self.energy).square().sum()
        self.input_total = self.input_total + rows.to(self.energy).sum(dim=0)
        if self.center:
            rows = rows - rows.sum(dim=0) / finite.sum()
        alignment = cosines(rows @ direction.to(rows), torch.linalg.vector_norm(rows, dim=1))
        alignment = torch.where(finite, alignment, torch.nan)
        positive, negative = sign_counts(alignment)
        self.positive, self.negative = self.positive + positive, self.negative + negative
        self.zero = self.zero + (alignment == 0).sum()
        self.histogram = self.histogram + alignment_histogram(alignment)
        valid = alignment.to(self.total).nan_to_num(0.0)
        self.total, self.squares = self.total + valid.sum(), self.squares + valid.square().sum()

    def compute(self) -> Tensor:
        """Sign diversity of everything seen so far."""
        return diversity_of_counts(self.positive, self.negative)

    @property
    def count(self) -> Tensor:
        """Number of inputs behind the value, those of neither sign included."""
        return self.positive + self.negative + self.zero

    @property
    def majority_fraction(self) -> Tensor:
        """Share of the more frequent sign, 1/2 to 1."""
        return 1 - self.compute() / 2

    @property
    def mean(self) -> Tensor:
        """Mean alignment, -1 to 1."""
        return self.total / self.count

    @property
    def std(self) -> Tensor:
        """Standard deviation of the alignment over the inputs, 0 to 1."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0).sqrt()

    @property
    def mean_energy_share(self) -> Tensor:
        """Share of the inputs' energy in their mean, 0 to 1, centered or not."""
        return self.input_total.square().sum() / (self.count * self.energy)


def alignment_histogram(alignment: Tensor) -> Tensor:
    """Count alignments ``(..., N)`` in :data:`BINS` equal bins over [-1, 1]; shape ``(..., BINS)``, NaN not counted."""
    bins = ((alignment.movedim(-1, 0) + 1) * (BINS / 2)).floor().clamp(0, BINS - 1)
    # compared rather than `bincount`ed, which synchronizes; NaN equals no bin
    return (bins.unsqueeze(-1) == torch.arange(BINS, device=bins.device)).sum(dim=0)
