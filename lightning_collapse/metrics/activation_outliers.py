"""Activation outliers, streaming: exact over batches, over processes and over a resume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.activation_outliers import activation_outliers
from lightning_collapse.metrics.sums import StatisticsMetric
from lightning_collapse.spectral.entry_moments import EntryMoments


class ActivationOutliers(StatisticsMetric[EntryMoments]):
    r"""How far the largest activations seen since the last reset are from the others.

    See :func:`~lightning_collapse.functional.activation_outliers`. Keeps
    :class:`~lightning_collapse.spectral.EntryMoments`, so memory is ``O(dim)`` however many rows arrive, and
    ``compute`` gives every process the value of the rows of all of them, by all-reduces and not by gathering.

    As input to ``update``:

    - ``features`` (:class:`~torch.Tensor`): What a layer returned, shape ``(N, dim)``, any floating dtype.
    - ``mask`` (:class:`~torch.Tensor`, optional): Boolean, shape ``(N,)``: rows to count.

    As output of ``compute``, a dictionary of scalars, ``float64``, NaN before the first row: the nine readings of that
    function by name, and ``n``, the rows behind them.

    Args:
        dim: Number of neurons ``D``.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dim`` is not positive; in ``update``, if the features have another width.

    Example:
        >>> metric = ActivationOutliers(dim=2)
        >>> metric.update(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        >>> metric.update(torch.tensor([[7.0, 1.0]]))
        >>> metric.compute()["abs_max"]
        tensor(7., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False

    def __init__(self, dim: int, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"`dim` is the number of neurons and must be positive, got {dim}.")
        self.dim = dim
        self._begin(EntryMoments(dim, dtype=dtype))

    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add rows of shape ``(N, dim)``."""
        moments = self.moments()
        moments.update(features, mask)
        self._set(moments)

    def compute(self) -> dict[str, Tensor]:
        """The readings of everything seen so far."""
        moments = self.moments()
        return {**activation_outliers(moments).as_dict(), "n": moments.count}

    def _from_states(self, states: dict[str, Any]) -> EntryMoments:
        return EntryMoments.from_states(states)
