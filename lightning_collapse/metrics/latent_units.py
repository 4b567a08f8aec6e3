"""Units of a Gaussian latent, streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.latent_units import COLUMNS, latent_readings, latent_sums
from lightning_collapse.metrics.sums import SumsMetric


class LatentUnits(SumsMetric):
    """How many units of a Gaussian latent hold something, over all rows seen since the last reset.

    Sums of every unit: memory does not grow, uneven batches weigh right, and ``compute`` gives every process the values
    over the rows of all of them.

    As input to ``update``: ``mean`` and ``log_variance`` of posteriors, each ``(N, units)``; of a conditional prior
    first :func:`~lightning_collapse.functional.whitened_posterior`.

    As output of ``compute``: the dictionary that :func:`~lightning_collapse.functional.latent_readings` returns, but
    for ``nonfinite`` and ``units``.

    Args:
        units: Width of the latent.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Attributes:
        sums: What :func:`~lightning_collapse.functional.latent_sums` returns, over all rows.
        nonfinite: Rows of this process that were left out.

    Raises:
        ValueError: If there is no unit; in ``update``, if there is another number.

    Example:
        >>> metric = LatentUnits(units=1)
        >>> metric.update(torch.tensor([[1.0], [-1.0]]), torch.full((2, 1), -4.0))
        >>> metric.compute()["active_units"].item()
        1.0
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    sums: Tensor

    def __init__(self, units: int, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if units < 1:
            raise ValueError(f"`units` must be at least 1, got {units}.")
        self.units = units
        self.add_state("sums", torch.zeros(2 + len(COLUMNS) * units, dtype=dtype), dist_reduce_fx="sum")

    def update(self, mean: Tensor, log_variance: Tensor, mask: Tensor | None = None) -> None:
        """Add posteriors, each ``(N, units)``, with a boolean mask ``(N,)``."""
        if mean.ndim != 2 or mean.shape[1] != self.units:
            raise ValueError(f"`mean` must have shape (N, {self.units}), got {tuple(mean.shape)}.")
        self.sums = self.sums + latent_sums(mean.detach(), log_variance.detach(), mask).to(self.sums)

    def compute(self) -> dict[str, Tensor]:
        """Readings over everything seen so far."""
        found = latent_readings(self.sums)
        return {name: value for name, value in found.items() if name not in ("nonfinite", "units")}

    @property
    def nonfinite(self) -> Tensor:
        """Rows of this process that were left out, 0-dimensional."""
        return self.sums[1]
