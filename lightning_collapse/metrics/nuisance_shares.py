"""Shares of class and nuisance factor in the features' variation, streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.factors.nuisance import nuisance_cdnv, nuisance_shares
from lightning_collapse.metrics.sums import StatisticsMetric
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.utilities.arguments import require_whole


class NuisanceShares(StatisticsMetric[ClassMoments]):
    """:func:`~lightning_collapse.functional.factors.nuisance_shares` of all features seen since the last reset.

    Keeps the number, mean and scatter of every cell of class and domain: ``2 * num_classes * num_domains * dim``
    numbers. Rows with NaN or infinity, and those whose class or domain is out of range, are left out.

    As input to ``update``: features ``(N, dim)``, and classes and domains ``(N,)``, integers.

    As output of ``compute``, 0-dimensional: the shares ``between_class``, ``between_domain``, ``interaction`` and
    ``residual``, the first two of features that know nothing as ``class_null`` and ``domain_null``, the mean
    ``domain_cdnv`` of :func:`~lightning_collapse.functional.factors.nuisance_cdnv`, and ``n`` rows.

    Args:
        num_classes: Number of classes.
        num_domains: Number of domains, or values of another nuisance factor.
        dim: Number of features.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range; in ``update``, if a shape does not fit or labels are no integers.

    Example:
        >>> metric = NuisanceShares(num_classes=2, num_domains=2, dim=1)
        >>> rows = torch.tensor([[0.0], [2.0], [6.0], [8.0]])
        >>> metric.update(rows, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items() if "between" in name}
        {'between_class': 0.9, 'between_domain': 0.1}
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    sizes = ("num_classes", "num_domains", "dim")

    def __init__(
        self, num_classes: int, num_domains: int, dim: int, dtype: torch.dtype = torch.float64, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        require_whole(1, num_classes=num_classes, num_domains=num_domains, dim=dim)
        self.num_classes, self.num_domains, self.dim = num_classes, num_domains, dim
        self._begin(ClassMoments(num_classes * num_domains, dim, scatter=False, dtype=dtype))

    def update(self, features: Tensor, classes: Tensor, domains: Tensor) -> None:
        """Add rows ``(N, dim)``, their classes ``(N,)`` and their domains ``(N,)``."""
        classes = classes.to(torch.promote_types(classes.dtype, torch.int64))  # small integers would overflow
        known = (classes >= 0) & (classes < self.num_classes) & (domains >= 0) & (domains < self.num_domains)
        self.moments().update(features, torch.where(known, classes * self.num_domains + domains, -1))

    def compute(self) -> dict[str, Tensor]:
        """Shares of everything seen so far."""
        moments, shape = self.moments(), (self.num_classes, self.num_domains)
        cells = moments.count.view(shape), moments.means.view(*shape, -1), moments.within_traces.view(shape)
        shares, null = nuisance_shares(*cells)
        names = ("between_class", "between_domain", "interaction", "residual")
        found = dict(zip(names, shares, strict=True)) | {"class_null": null[0], "domain_null": null[1]}
        return found | {"domain_cdnv": nuisance_cdnv(*cells).mean, "n": moments.count.sum().long()}

    def _from_states(self, states: dict[str, Any]) -> ClassMoments:
        return ClassMoments.from_states(states)
