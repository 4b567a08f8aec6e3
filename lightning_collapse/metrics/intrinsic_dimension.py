"""Intrinsic dimension, streaming: from a bounded sample of rows that is the same however the stream is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lightning_collapse.functional.intrinsic_dimension import local_dimension_of_distances, two_nn_of_distances
from lightning_collapse.metrics.sums import SumsMetric
from lightning_collapse.spectral.neighbors import nearest_distances
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.distributed import all_gather_rows, all_reduce_max, all_reduce_sum, world_size

STATES = ("rows", "priority", "seen")
NEVER = 1 << 52
"""Priority of rows that must not be taken; larger than all others, and exact in double precision."""


class IntrinsicDimension(SumsMetric):
    r"""Intrinsic dimension of all features seen since the last reset, from a uniform sample of them.

    See :func:`~lightning_collapse.functional.two_nn` and
    :func:`~lightning_collapse.functional.local_intrinsic_dimension`. Distances do not add up, so rows are kept: every
    row gets a pseudo-random priority, a hash of its place in the stream of its process, and those with the smallest
    stay. Such a sample is uniform and depends neither on the split into batches nor on the state of any random
    number generator; the one of all processes together is drawn from theirs. Rows with NaN or infinity do not take
    part.

    As input to ``update``:

    - ``features`` (:class:`~torch.Tensor`): Representations, shape ``(N, D)``, any floating dtype.
    - ``mask`` (:class:`~torch.Tensor`, optional): Boolean, shape ``(N,)``: rows to count.

    As output of ``compute``, a dictionary of scalars, ``float64``:

    - ``two_nn``: global dimension from two neighbours;
    - ``lid``: dimension from ``k`` neighbours, by maximum likelihood;
    - ``n``: rows behind ``two_nn``;
    - ``ties``: rows left out for repeating another one or for two equally near neighbours.

    Args:
        capacity: Rows to keep, over all processes together in the end; the estimates depend on it.
        k: Neighbours of ``lid``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``capacity`` or ``k`` is less than 3; in ``update``, if the features have another width.

    Example:
        >>> metric = IntrinsicDimension()
        >>> metric.update(torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 5))
        >>> metric.compute()["two_nn"].round(), metric.compute()["n"]
        (tensor(1., dtype=torch.float64), tensor(1000., dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = True  # two samples merge by more than a sum per state

    rows: Tensor
    priority: Tensor
    seen: Tensor

    def __init__(self, capacity: int = 2048, k: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, number in (("capacity", capacity), ("k", k)):
            if number < 3:
                raise ValueError(f"`{name}` must be at least 3, got {number}.")
        self.capacity, self.k = capacity, k
        self.add_state("rows", torch.zeros(0, 0), dist_reduce_fx=None)
        self.add_state("priority", torch.zeros(0, dtype=torch.int64), dist_reduce_fx=None)
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    @full_precision
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add rows of shape ``(N, D)``."""
        width = self.rows.shape[1] or features.shape[-1]
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(
                f"`features` must have shape (N, {width}), got {tuple(features.shape)}."
                " Flatten tokens or pool maps first."
            )
        rows, _, weight = finite_rows(features.detach(), mask)
        rank = dist.get_rank(self.process_group) if world_size(self.process_group) > 1 else 0
        places = self.seen + torch.arange(len(rows), device=rows.device)
        self._keep(rows, torch.where(weight > 0, _hash(places, rank), NEVER))
        self.seen = self.seen + len(rows)

    def compute(self) -> dict[str, Tensor]:
        """Both dimensions of everything seen so far."""
        found = nearest_distances(self.rows, self.k, self.priority < NEVER)
        dimension, n, ties = two_nn_of_distances(*found)
        return {"two_nn": dimension, "lid": local_dimension_of_distances(*found).dimension, "n": n, "ties": ties}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of this class has seen."""
        if isinstance(incoming_state, Metric):
            incoming_state = {name: getattr(incoming_state, name, None) for name in STATES}
        rows, priority, seen = (incoming_state.get(name) for name in STATES)
        if (
            not (isinstance(rows, Tensor) and isinstance(priority, Tensor) and seen is not None)
            or len({self.rows.shape[1], rows.shape[1]} - {0}) > 1
        ):
            raise ValueError(
                "`incoming_state` must be an `IntrinsicDimension` metric, or its states, with features as wide."
            )
        if len(rows):
            self._keep(rows, priority)
        self.seen = self.seen + seen
        self._computed = None
        self._update_count += 1

    def _keep(self, rows: Tensor, priority: Tensor) -> None:
        """Add rows to the sample, and leave those with the smallest priorities in it."""
        if self.rows.shape[1]:
            rows, priority = torch.cat([self.rows, rows]), torch.cat([self.priority, priority])
        if len(rows) > self.capacity:
            best = priority.argsort(stable=True)[: self.capacity]
            rows, priority = rows[best], priority[best]
        self.rows, self.priority = rows, priority

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        group = process_group or self.process_group
        width = int(all_reduce_max(torch.tensor(self.rows.shape[1], device=self.rows.device), group))
        own = self.rows if self.rows.shape[1] else self.rows.new_zeros(0, width)
        # priorities are exact in double precision, and travel as a column
        message = torch.cat([own.double(), self.priority.double().unsqueeze(1)], dim=1)
        gathered, valid = all_gather_rows(message, group=group)
        priority = torch.where(valid, gathered[:, -1].long(), NEVER)
        self.rows, self.priority = self.rows.new_zeros(0, 0), self.priority.new_zeros(0)
        self._keep(gathered[:, :-1], priority)
        self.seen = all_reduce_sum(self.seen, group)


def _hash(places: Tensor, stream: int) -> Tensor:
    """Pseudo-random numbers below 2 ** 52 from places in a stream: the finalizer of SplitMix64."""
    x = places.to(torch.int64) + _signed(0x9E3779B97F4A7C15 * (2 * stream + 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x.bitwise_right_shift(shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x.bitwise_right_shift(12) & (NEVER - 1)


def _signed(number: int) -> int:
    """The 64-bit integer with the same bits: products of integer tensors wrap around."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
