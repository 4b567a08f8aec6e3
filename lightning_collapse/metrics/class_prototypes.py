"""Nearest class mean (NCM), streaming: a prototype for each class that comes, and a head made of them."""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_collapse.functional.prototypes.scores import prototype_logits, unit_rows
from lightning_collapse.metrics.sums import StatisticsMetric
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.utilities.distributed import all_reduce_max


class ClassPrototypes(StatisticsMetric[ClassMoments]):
    r"""Class means of all features since the last reset, in as many classes as have come; exact over processes.

    In place of a head: ``logits`` needs no training and forgets no class, as long as the features stay. Memory is
    ``2 C D``. An update waits for the device once, to see whether a class is new.

    As input to ``update``: ``features`` ``(N, D)``, rows with NaN or infinity do not count, and ``labels`` ``(N,)``,
    integers, of which negative ones name no class.

    As output of ``compute``: ``prototypes`` ``(C, D)``, ``float64``, NaN for a class that has no rows, and ``radius``,
    0-dimensional, :math:`\sqrt{\operatorname{mean}_c \operatorname{tr} \Sigma_c / D}` over classes that have (NaN for
    none): the ``r`` of :func:`~lightning_collapse.functional.prototypes.sample_prototypes`.

    Args:
        dim: Number of features ``D``.
        normalize: Divide rows by their length before anything is summed, and compare by cosine; else by distance.
        room: Classes that there may be: no slip in a label is to fill the memory.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: In ``update``, if a shape does not fit, labels are no integers or name a class beyond ``room``; in
            ``logits``, if no class has come.

    Example:
        >>> head = ClassPrototypes(dim=2)
        >>> head.update(torch.tensor([[0.0, 1.0], [2.0, 1.0], [9.0, 9.0]]), torch.tensor([0, 0, 2]))
        >>> head.predict(torch.tensor([[1.0, 0.0], [7.0, 7.0]]))
        tensor([0, 2])
    """

    is_differentiable = False
    higher_is_better: bool | None = None

    count: Tensor

    def __init__(
        self, dim: int, normalize: bool = False, room: int = 65_536, dtype: torch.dtype = torch.float64, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"`dim` is the number of features and must be positive, got {dim}.")
        self.dim, self.normalize, self.room = dim, normalize, room
        self._begin(ClassMoments(0, dim, scatter=False, dtype=dtype))

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add rows of shape ``(N, dim)`` and their classes ``(N,)``."""
        if labels.numel() and not labels.is_floating_point() and not labels.is_complex():
            classes = int(labels.max()) + 1
            if classes > self.room:
                raise ValueError(
                    f"`labels` name class {classes - 1}, and there is room for {self.room}. Number classes from 0, or"
                    f" pass `room={classes}`."
                )
            self._grow(max(classes, 1))  # what names no class needs a place to have no weight at
        rows = unit_rows(features.detach().to(self.count.dtype)) if self.normalize else features
        self.moments().update(rows, labels)

    def compute(self) -> dict[str, Tensor]:
        """Prototypes and radius of everything seen so far."""
        moments, seen = self.moments(), self.count > 0
        variance = torch.where(seen, moments.within_traces / self.count.clamp_min(1), 0.0).sum() / self.dim
        radius = torch.where(seen.any(), (variance / seen.sum()).sqrt(), nan)
        return {"prototypes": moments.means, "radius": radius}

    def logits(self, features: Tensor, temperature: float = 1.0) -> Tensor:
        """:func:`~lightning_collapse.functional.prototypes.prototype_logits`, ``(N, C)``; collective the first time."""
        prototypes = self.compute()["prototypes"].reshape(-1, self.dim)  # torchmetrics makes a scalar of one number
        return prototype_logits(features, prototypes, "cosine" if self.normalize else "euclidean", temperature)

    def predict(self, features: Tensor) -> Tensor:
        """Class of the nearest prototype, ``(N,)``."""
        return self.logits(features).argmax(dim=1)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another one has seen, exactly; either may have seen more classes."""
        states: Any = incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state
        if isinstance(states, dict) and states.keys() == self.metric_state.keys():
            states = self._from_states(states).grow(len(self.count)).states()
            self._grow(len(states["count"]))
        super().merge_state(states)

    def _from_states(self, states: dict[str, Any]) -> ClassMoments:
        return ClassMoments.from_states(states)

    def _grow(self, classes: int) -> None:
        self._set(self.moments().grow(classes))

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        own = torch.tensor(len(self.count), device=self.count.device)
        self._grow(int(all_reduce_max(own, process_group or self.process_group)))
        super()._sync_dist(dist_sync_fn, process_group)
