"""Spectrum, streaming: exact over batches, over processes and over a resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_collapse.metrics.sums import SumsMetric
from lightning_collapse.spectral.moments import STATES, Moments
from lightning_collapse.spectral.spectrum import Spectrum as SpectrumRecord


class Spectrum(SumsMetric):
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
    # two streams merge by more than a sum per state, so `forward` updates twice instead of merging
    full_state_update = True

    count: Tensor
    shift: Tensor

    def __init__(self, dim: int, center: bool = True, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"`dim` is the number of features and must be positive, got {dim}.")
        self.dim = dim
        self.center = center
        for name, state in Moments(dim, dtype=dtype).states().items():
            self.add_state(name, state, dist_reduce_fx=None)

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

    def moments(self) -> Moments:
        """The accumulated statistics."""
        return Moments.from_states({name: getattr(self, name) for name in STATES})

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of this class has seen, exactly."""
        if isinstance(incoming_state, Metric):
            incoming_state = {name: getattr(incoming_state, name, None) for name in STATES}
        shift = incoming_state.get("shift") if isinstance(incoming_state, dict) else None
        if shift is None or shift.shape != self.shift.shape or not set(STATES) <= set(incoming_state):
            raise ValueError(
                f"`incoming_state` must be a `Spectrum` metric, or its states, of `dim={self.dim}`, got"
                f" {type(incoming_state).__name__}."
            )
        self._set(self.moments().merge(Moments.from_states(incoming_state)))
        self._computed = None
        self._update_count += 1

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        # the states are sums about a shift that differs between processes: reducing each by itself would be wrong,
        # and the default gathers a copy of every state per process
        self._set(self.moments().reduce(process_group or self.process_group))

    def _unless_empty(self, value: Tensor) -> Tensor:
        return torch.where(self.count > 0, value, torch.nan)

    def _set(self, moments: Moments) -> None:
        for name, state in moments.states().items():
            setattr(self, name, state)
