"""Activation outliers, streaming: exact over batches, over processes and over a resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_collapse.functional.activation_outliers import activation_outliers
from lightning_collapse.metrics.sums import SumsMetric
from lightning_collapse.spectral.entry_moments import ENTRY_STATES, EntryMoments


class ActivationOutliers(SumsMetric):
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
    # two streams merge by more than a sum per state, so `forward` updates twice instead of merging
    full_state_update = True

    def __init__(self, dim: int, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"`dim` is the number of neurons and must be positive, got {dim}.")
        self.dim = dim
        for name, state in EntryMoments(dim, dtype=dtype).states().items():
            self.add_state(name, state, dist_reduce_fx=None)

    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add rows of shape ``(N, dim)``."""
        moments = self.moments()
        moments.update(features, mask)
        self._set(moments)

    def compute(self) -> dict[str, Tensor]:
        """The readings of everything seen so far."""
        moments = self.moments()
        return {**activation_outliers(moments).as_dict(), "n": moments.count}

    def moments(self) -> EntryMoments:
        """The accumulated statistics."""
        return EntryMoments.from_states({name: getattr(self, name) for name in ENTRY_STATES})

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of this class has seen."""
        if isinstance(incoming_state, Metric):
            incoming_state = {name: getattr(incoming_state, name, None) for name in ENTRY_STATES}
        squares = incoming_state.get("squares") if isinstance(incoming_state, dict) else None
        if squares is None or len(squares) != self.dim or not set(ENTRY_STATES) <= set(incoming_state):
            raise ValueError(
                f"`incoming_state` must be an `ActivationOutliers` metric, or its states, of `dim={self.dim}`, got"
                f" {type(incoming_state).__name__}."
            )
        self._set(self.moments().merge(EntryMoments.from_states(incoming_state)))
        self._computed = None
        self._update_count += 1

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        # the powers are about an anchor that differs between processes, and extremes are no sums
        self._set(self.moments().reduce(process_group or self.process_group))

    def _set(self, moments: EntryMoments) -> None:
        for name, state in moments.states().items():
            setattr(self, name, state)
