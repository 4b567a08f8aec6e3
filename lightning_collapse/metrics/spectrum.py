"""Spectrum, streaming: exact over batches, over processes and over a resume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.metrics.sums import StatisticsMetric
from lightning_collapse.spectral.moments import Moments
from lightning_collapse.spectral.spectrum import Spectrum as SpectrumRecord


class Spectrum(StatisticsMetric[Moments]):
    r"""Singular values of all features seen since the last reset.

    Keeps :class:`~lightning_collapse.spectral.Moments`, so memory is ``O(dim ** 2)`` however many samples arrive,
    uneven batches weigh right, and ``compute`` gives every process the spectrum of the rows of all of them, by
    all-reduces of ``dim ** 2`` numbers and not by gathering. Rows with NaN or infinity are left out. Only the states
    are half-safe: feed it any floating dtype, under autocast or not.

    As input to ``update``:

    - ``features`` (:class:`~torch.Tensor`): Representations, shape ``(N, dim)``, any floating dtype.
    - ``mask`` (:class:`~torch.Tensor`, optional): Boolean, shape ``(N,)``: rows to count.

    As output of ``compute``:

    - ``singular_values`` (:class:`~torch.Tensor`): Descending, shape ``(dim,)``, ``float64``; NaN before the first row.

    Args:
        dim: Number of features ``D``.
        center: Of the centered features, or of the features as they are.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dim`` is not positive; in ``update``, if the features have another width.

    Example:
        >>> spectrum = Spectrum(dim=2)
        >>> spectrum.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> spectrum.compute()
        tensor([1.4142, 0.0000], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better: bool | None = None

    count: Tensor
    shift: Tensor

    def __init__(self, dim: int, center: bool = True, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"`dim` is the number of features and must be positive, got {dim}.")
        self.dim = dim
        self.center = center
        self._begin(Moments(dim, dtype=dtype))

    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add rows of shape ``(N, dim)``."""
        moments = self.moments()
        moments.update(features, mask)
        self._set(moments)

    def compute(self) -> Tensor:
        """Singular values of everything seen so far."""
        return self._unless_empty(self.record().singular_values)

    def record(self) -> SpectrumRecord:
        """The full record that the measures take, of what this process has seen."""
        return self.moments().spectrum(self.center)

    def _from_states(self, states: dict[str, Any]) -> Moments:
        return Moments.from_states(states)

    def _unless_empty(self, value: Tensor) -> Tensor:
        return torch.where(self.count > 0, value, torch.nan)
