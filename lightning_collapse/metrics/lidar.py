"""LiDAR, streaming: exact over batches, over processes and over a resume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.lidar import lidar_of_moments, stack_views
from lightning_collapse.metrics.sums import StatisticsMetric
from lightning_collapse.spectral.view_moments import ViewMoments


class LiDAR(StatisticsMetric[ViewMoments]):
    r"""Linear discriminant analysis rank of all samples seen since the last reset.

    See :func:`~lightning_collapse.functional.lidar`. Keeps :class:`~lightning_collapse.spectral.ViewMoments`, so memory
    is ``O(dim ** 2)`` however many samples arrive, and ``compute`` gives every process the value of the samples of all
    of them, by all-reduces and not by gathering. All views of a sample come in one update, so none straddles batches or
    processes.

    As input to ``update``:

    - ``views`` (two or more :class:`~torch.Tensor`): Views of the same samples, shape ``(N, dim)`` each, any floating
      dtype; samples with NaN or infinity do not count.

    As output of ``compute``, a dictionary of scalars, ``float64``, NaN for fewer than two samples:

    - ``lidar``: effective rank, 1 (collapsed) to ``min(dim, n - 1)``;
    - ``excess``: variance between samples over that within; 0 if views of a sample have nothing in common;
    - ``n``: samples.

    Args:
        dim: Number of features ``D``.
        delta: Added to the covariance within samples.
        eps: Added to the shares of the eigenvalues.
        relative: Take ``delta`` in units of the mean variance within samples.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dim`` or ``delta`` is not positive; in ``update``, if a shape does not fit.

    Example:
        >>> metric = LiDAR(dim=4)
        >>> signal = torch.eye(6)[:, :4] * 3
        >>> metric.update(signal + 0.1, signal - 0.1)
        >>> metric.compute()["lidar"].round(decimals=2)
        tensor(3., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True

    def __init__(
        self,
        dim: int,
        delta: float = 1e-4,
        eps: float = 1e-8,
        relative: bool = False,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, number in (("dim", dim), ("delta", delta)):
            if not number > 0:
                raise ValueError(f"`{name}` must be positive, got {number}.")
        self.dim, self.delta, self.eps, self.relative = dim, delta, eps, relative
        self._begin(ViewMoments(dim, dtype=dtype))

    def update(self, *views: Tensor) -> None:
        """Add samples: their views, shape ``(N, dim)`` each."""
        moments = self.moments()
        moments.update(stack_views(*views))
        self._set(moments)

    def compute(self) -> dict[str, Tensor]:
        """LiDAR of everything seen so far."""
        rank, excess, n = lidar_of_moments(self.moments(), self.delta, self.eps, self.relative)
        return {"lidar": rank, "excess": excess, "n": n}

    def _from_states(self, states: dict[str, Any]) -> ViewMoments:
        return ViewMoments.from_states(states)
