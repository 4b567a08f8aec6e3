"""Feature suppression, streaming: a linear probe for every labelled factor, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_collapse.functional.factors.linear_probe import probe_errors
from lightning_collapse.metrics.sums import StatisticsMetric
from lightning_collapse.spectral.moments import Moments, reduce_moments
from lightning_collapse.utilities.arguments import require_not_negative, require_whole


class SplitMoments(NamedTuple):
    """Moments of the rows a probe is fitted to, and of those it is judged on."""

    train: Moments
    held_out: Moments

    def states(self) -> dict[str, Tensor]:
        """All there is to save or to send, by name."""
        return {
            f"{part}_{name}": value for part in self._fields for name, value in getattr(self, part).states().items()
        }

    def merge(self, other: SplitMoments) -> SplitMoments:
        """Those of both streams together."""
        return SplitMoments(self.train.merge(other.train), self.held_out.merge(other.held_out))

    def reduce(self, group: Any = None) -> SplitMoments:
        """Those of all processes together. Collective."""
        return SplitMoments(*reduce_moments([self.train, self.held_out], group))


class LinearProbe(StatisticsMetric[SplitMoments]):
    """:func:`~lightning_collapse.functional.factors.linear_probe` for several labelled factors, from moments alone.

    The probe is fitted and judged from second moments of features and one-hot labels, of two disjoint sets of rows: no
    row is kept, nothing is trained, and every process reads the same. Rows with NaN or infinity, and rows that lack the
    label of any factor, are left out.

    As input to ``update``: features ``(N, dim)``; factors ``(N, F)``, integers, in the order of ``factors``; and which
    rows are held out, boolean ``(N,)``, or one boolean for all of them.

    As output of ``compute``, 0-dimensional: of each factor its coefficient of determination, pooled over its
    classes, at most 1, and not above 0 where the factor is lost; ``null``, what Gaussian features that
    know nothing read at ``ridge=0`` (more ridge brings it nearer to 0); ``n``, rows fitted to.

    Args:
        dim: Number of features ``D``.
        factors: Number of classes of each factor, by name.
        ridge: As there.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range; in ``update``, if a shape does not fit.

    Example:
        >>> shape, color = torch.arange(40) % 2, torch.arange(40) // 2 % 2
        >>> probe = LinearProbe(dim=1, factors={"shape": 2, "color": 2})
        >>> features = shape.unsqueeze(1).float()  # the color is gone
        >>> probe.update(features, torch.stack([shape, color], dim=1), held_out=torch.arange(40) >= 20)
        >>> {name: round(value.item(), 2) for name, value in probe.compute().items()}
        {'shape': 1.0, 'color': 0.0, 'null': -0.06, 'n': 20}
    """

    is_differentiable = False
    higher_is_better = True
    sizes = ("dim", "factors")

    def __init__(
        self,
        dim: int,
        factors: Mapping[str, int],
        ridge: float = 1e-3,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_whole(1, dim=dim)
        require_not_negative(ridge=ridge)
        if not factors or {"null", "n"} & factors.keys() or min(factors.values()) < 2:
            raise ValueError(
                f"`factors` must give names, not `null` or `n`, and 2 classes or more each, got {factors}."
            )
        self.dim, self.factors, self.ridge = dim, dict(factors), ridge
        width = dim + sum(factors.values())
        self._begin(SplitMoments(*(Moments(width, dtype=dtype) for _ in range(2))))

    def update(self, features: Tensor, factors: Tensor, held_out: Tensor | bool = False) -> None:
        """Add rows ``(N, dim)``, their labels ``(N, F)``, and which of them are held out."""
        fits = (
            features.ndim == 2 and features.shape[1] == self.dim and factors.shape == (len(features), len(self.factors))
        )
        if not fits or factors.is_floating_point():
            raise ValueError(
                f"`features` and integer `factors` must have shapes (N, {self.dim}) and (N, {len(self.factors)}), got"
                f" {tuple(features.shape)} and {factors.dtype} of {tuple(factors.shape)}."
            )
        sizes = torch.tensor(list(self.factors.values()), device=factors.device)
        known = ((factors >= 0) & (factors < sizes)).all(dim=1)
        safe = torch.where(known.unsqueeze(1), factors, 0).long()
        columns = [one_hot(safe[:, i], size) for i, size in enumerate(self.factors.values())]
        moments = self.moments()
        rows = torch.cat([features.detach().to(moments.train.shift.dtype), *columns], dim=1)
        held = torch.as_tensor(held_out, device=known.device)
        if held.dtype != torch.bool or held.shape not in ((), known.shape):
            raise ValueError(
                f"`held_out` must be boolean of shape ({len(known)},), or one boolean, got {held.dtype} of"
                f" {tuple(held.shape)}."
            )
        held = held.expand(len(known))
        moments.train.update(rows, known & ~held)
        moments.held_out.update(rows, known & held)
        self._set(moments)

    def compute(self) -> dict[str, Tensor]:
        """How much of each factor is found, in everything seen so far."""
        train, held_out = self.moments()
        error, total = probe_errors(train, held_out, self.dim, self.ridge)
        sizes = list(self.factors.values())
        parts = zip(self.factors, torch.split(error, sizes), torch.split(total, sizes), strict=True)
        found = {name: 1 - left.sum() / all_.sum() for name, left, all_ in parts}
        spare = train.count - self.dim - 2
        return found | {"null": torch.where(spare > 0, -self.dim / spare, torch.nan), "n": train.count.long()}

    def _from_states(self, states: dict[str, Any]) -> SplitMoments:
        def part(prefix: str) -> Moments:
            return Moments.from_states({name: states[f"{prefix}_{name}"] for name in Moments.names})

        return SplitMoments(part("train"), part("held_out"))
