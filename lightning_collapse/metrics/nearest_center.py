"""NC4, streaming: how often the classifier picks the class whose mean is nearest."""

from __future__ import annotations

from math import nan
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.nc4 import agreement_counts
from lightning_collapse.metrics.sums import SumsMetric


class NearestClassCenterAgreement(SumsMetric):
    r"""Share of features on which classifier and nearest class mean agree: one minus NC4.

    See :func:`~lightning_collapse.functional.nc4`. The means must be final, so they come from another pass: a first one
    over the same data, as published, or that of the epoch before, which then are stale. The states are counts, so any
    split and any number of processes give the same value, if all of them were given the same means.

    As input to ``update``:

    - ``features`` (:class:`~torch.Tensor`): What the classifier multiplies, shape ``(N, D)``; rows with NaN or infinity
      do not count.
    - ``logits`` (:class:`~torch.Tensor`): What the classifier makes of them, its bias included, shape ``(N, C)``.
    - ``means``, ``counts`` (:class:`~torch.Tensor`, optional): Class means ``(C, D)`` and rows per class ``(C,)`` for
      this batch, instead of those given at construction.

    As output of ``compute``:

    - ``agreement`` (:class:`~torch.Tensor`): Scalar, 0 to 1 (collapsed), NaN for no features.

    Args:
        means: Class means, shape ``(C, D)``, for instance ``NeuralCollapse.moments().means``.
        counts: Rows of each class, shape ``(C,)``; a class without rows is nobody's nearest.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: In ``update``, if there are no means or a shape does not fit.

    Example:
        >>> metric = NearestClassCenterAgreement(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.9, 0.0], [-3.0, 1.0]]), torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    agree: Tensor
    count: Tensor
    means: Tensor | None
    counts: Tensor | None

    def __init__(self, means: Tensor | None = None, counts: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # they move with the module, but are no part of its checkpoint
        self.register_buffer("means", None if means is None else means.detach().clone(), persistent=False)
        self.register_buffer("counts", None if counts is None else counts.detach().clone(), persistent=False)
        for name in ("agree", "count"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self, features: Tensor, logits: Tensor, means: Tensor | None = None, counts: Tensor | None = None
    ) -> None:
        """Add features ``(N, D)`` and their logits ``(N, C)``."""
        if means is None:
            means, counts = self.means, self.counts
        if means is None:
            raise ValueError("`means` must be given, at construction or with every update.")
        agree, count = agreement_counts(features, logits, means, counts)
        self.agree, self.count = self.agree + agree, self.count + count

    def compute(self) -> Tensor:
        """Agreement over everything seen so far."""
        return torch.where(self.count > 0, self.agree.double() / self.count.clamp_min(1), nan)
