"""Feature moments: mean and variance of every feature of a stream, right at any offset, additive over its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.spectral.named_states import NamedStates
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.distributed import all_reduce_sum


class FeatureMoments(NamedStates):
    """Count, means and sums of squares about the means (Chan et al. 1979), ``2 D + 2`` numbers.

    Rows with NaN or infinity are left out and counted. Nothing here waits for the device.

    Args:
        dim: Number of features ``D``.
        device: Where the sums live, in ``float64`` wherever it has it: gradients may be as small as ``1e-30``.

    Attributes:
        seen: Rows offered and not masked, 0-dimensional.
        count: Finite ones among them, 0-dimensional.
        mean: Of every feature, ``(D,)``.
        squares: Sum of squared distances to it, ``(D,)``.

    Example:
        >>> moments = FeatureMoments(1)
        >>> moments.update(torch.tensor([[1001.0], [999.0]]))
        >>> moments.update(torch.tensor([[1000.0], [torch.nan]]))
        >>> moments.variance, moments.count
        (tensor(0.6667, dtype=torch.float64), tensor(3., dtype=torch.float64))
    """

    names = ("seen", "count", "mean", "squares")

    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        dtype = accumulation_dtype(device)
        self.seen, self.count = torch.zeros(2, dtype=dtype, device=device).unbind()
        self.mean, self.squares = torch.zeros(2, dim, dtype=dtype, device=device).unbind()

    @property
    def variance(self) -> Tensor:
        """Mean over features of their variance over rows, 0-dimensional; NaN without rows."""
        return self.squares.mean() / self.count

    @torch.no_grad()
    @full_precision
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add rows ``(N, D)`` of any floating dtype; those where the boolean mask ``(N,)`` is false do not count."""
        wide = self.mean.dtype
        rows, seen, kept = finite_rows(features, mask)
        count = kept.sum(dtype=wide)
        mean = rows.sum(dim=0, dtype=wide) / count.clamp_min(1)
        anchored = (rows - mean.to(rows)) * kept.unsqueeze(1)
        squares = torch.linalg.vector_norm(anchored, dim=0, dtype=wide).square()  # not in single precision: 1e-20 ** 2
        own = {"seen": seen.to(wide), "count": count, "mean": mean, "squares": squares}
        merged = self.merge(self.from_states(own))
        for name, state in merged.states().items():
            setattr(self, name, state)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Statistics of both streams together."""
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count.clamp_min(1)
        states = {"seen": self.seen + other.seen, "count": count, "mean": mean}
        return self.from_states(states | {"squares": self._about(mean) + other._about(mean)})

    def _about(self, mean: Tensor) -> Tensor:
        return self.squares + self.count * (self.mean - mean).square()


def reduce_features(moments: Sequence[FeatureMoments]) -> list[FeatureMoments]:
    """Statistics of all processes together. Collective, with the same widths in the same order; two all-reduces.

    Example:
        >>> moments = FeatureMoments(2)
        >>> moments.update(torch.tensor([[1.0, 4.0], [3.0, 4.0]]).repeat(2, 1))
        >>> reduce_features([moments])[0].squares
        tensor([4., 0.], dtype=torch.float64)
    """
    sizes = [len(m.mean) for m in moments]
    counts = torch.stack([torch.stack([m.seen, m.count]) for m in moments])
    total = all_reduce_sum(torch.cat([counts.flatten(), *(m.count * m.mean for m in moments)]))
    counts, sums = total[: counts.numel()].view_as(counts), torch.split(total[counts.numel() :], sizes)
    means = [part / count.clamp_min(1) for part, count in zip(sums, counts[:, 1], strict=True)]
    about = all_reduce_sum(torch.cat([m._about(mean) for m, mean in zip(moments, means, strict=True)]))
    return [
        FeatureMoments.from_states({"seen": seen, "count": count, "mean": mean, "squares": square})
        for (seen, count), mean, square in zip(counts, means, torch.split(about, sizes), strict=True)
    ]
