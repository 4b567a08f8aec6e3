"""Streaming moments: first, second and (contracted) fourth, right at any offset, on any split, any rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvalues
from lightning_collapse.spectral.named_states import NamedStates
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.spectral.spectrum import RESOLUTION, Spectrum, finish_spectrum, relative_to_square
from lightning_collapse.utilities.distributed import all_reduce_sum

STATES = ("seen", "count", "shift", "total", "second", "cubic", "quartic")


class Moments(NamedStates):
    r"""Sufficient statistics of a stream of features, accumulated about a shift.

    With :math:`y = x - r` for a shift :math:`r` frozen at the mean of the first rows: :math:`n`, :math:`\sum y`,
    :math:`\sum y y^\top`, :math:`\sum \|y\|^2 y` and :math:`\sum \|y\|^4`. Two streams with different shifts merge
    exactly (Chan et al. 1979 for the first two moments), so splits, processes and resumed runs agree. The last two
    make the participation ratio's U-statistic possible; they cost ``d + 1`` numbers.

    Rows with NaN or infinity are left out and counted. Nothing here waits for the device.

    Args:
        dim: Number of features ``D``.
        device: Where the sums live.
        dtype: What they are summed in; the default is ``float64`` wherever the device has it.

    Attributes:
        seen: Rows offered and not masked, 0-dimensional.
        count: Finite ones among them, 0-dimensional.
        shift: The anchor, ``(D,)``.
        total: Sum of anchored rows, ``(D,)``.
        second: Sum of their outer products, ``(D, D)``.
        cubic: Sum of rows times their squared norm, ``(D,)``.
        quartic: Sum of fourth powers of norms, 0-dimensional.

    Example:
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1001.0, 0.0], [999.0, 0.0]]))
        >>> moments.mean, moments.scatter
        (tensor([1000.,    0.], dtype=torch.float64), tensor([[2., 0.],
                [0., 0.]], dtype=torch.float64))
    """

    names = STATES

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or accumulation_dtype(device)
        self.seen = torch.zeros((), dtype=dtype, device=device)
        self.count = torch.zeros((), dtype=dtype, device=device)
        self.shift = torch.zeros(dim, dtype=dtype, device=device)
        self.total = torch.zeros(dim, dtype=dtype, device=device)
        self.second = torch.zeros(dim, dim, dtype=dtype, device=device)
        self.cubic = torch.zeros(dim, dtype=dtype, device=device)
        self.quartic = torch.zeros((), dtype=dtype, device=device)

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add rows.

        Args:
            features: Shape ``(N, D)``, any floating dtype.
            mask: Boolean, shape ``(N,)``: rows to count, for instance tokens that are not padding.

        Raises:
            ValueError: If ``features`` is not a matrix of width ``D``.
        """
        if features.ndim != 2 or features.shape[1] != len(self.shift):
            raise ValueError(
                f"`features` must have shape (N, {len(self.shift)}), got {tuple(features.shape)}."
                " Flatten tokens or pool maps first."
            )
        self._update(features, mask)

    @full_precision
    def _update(self, features: Tensor, mask: Tensor | None) -> None:
        features, seen, weight = finite_rows(features, mask, self.shift.dtype)
        count = weight.sum()
        first = features.sum(dim=0) / count.clamp_min(1)
        # while nothing has been counted every sum is zero, so the anchor may still move
        self.shift = torch.where(self.count > 0, self.shift, first)
        anchored = (features - self.shift) * weight.unsqueeze(1)
        energy = anchored.square().sum(dim=1)
        self.seen = self.seen + seen
        self.count = self.count + count
        self.total = self.total + anchored.sum(dim=0)
        self.second = torch.addmm(self.second, anchored.T, anchored)
        self.cubic = self.cubic + energy @ anchored
        self.quartic = self.quartic + energy.square().sum()

    @full_precision
    def about(self, shift: Tensor) -> Moments:
        """The same statistics about another anchor of shape ``(D,)``; exact algebra, no data needed."""
        delta = shift - self.shift
        n, trace, energy = self.count, self.second.trace(), delta @ delta
        along, cross = self.second @ delta, self.total @ delta
        moved = self.from_states(self.states())
        moved.shift = shift
        moved.total = self.total - n * delta
        outer = torch.outer(self.total, delta)
        moved.second = self.second - outer - outer.T + n * torch.outer(delta, delta)
        moved.cubic = self.cubic - 2 * along + energy * self.total + (2 * cross - trace - n * energy) * delta
        moved.quartic = (
            self.quartic
            + 4 * (delta @ along)
            + n * energy.square()
            - 4 * (self.cubic @ delta)
            + 2 * energy * trace
            - 4 * energy * cross
        )
        return moved

    def merge(self, other: Moments) -> Moments:
        """Statistics of both streams together, exact whatever their anchors."""
        shift = torch.where(self.count > 0, self.shift, other.shift)
        first, second = self.about(shift), other.about(shift)
        merged = {name: getattr(first, name) + getattr(second, name) for name in STATES}
        return self.from_states(merged | {"shift": shift})

    def reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Statistics of all processes together, about the global mean.

        Collective: every process must call it, with the same ``D``; two all-reduces, ``d * d + 2 d + 3`` numbers.
        Without a process group the statistics are returned about their mean.
        """
        [reduced] = reduce_moments([self], group)
        return reduced

    @property
    def mean(self) -> Tensor:
        """Mean row, ``(D,)``; zero while nothing was counted."""
        return self.shift + self.total / self.count.clamp_min(1)

    @property
    def scatter(self) -> Tensor:
        """Sum of outer products of centered rows, ``(D, D)``: ``(n - 1)`` times the covariance."""
        return self.second - torch.outer(self.total, self.total) / self.count.clamp_min(1)

    def spectrum(self, center: bool = True) -> Spectrum:
        """Singular values of all rows seen, ``(D,)`` descending; never raises on bad numbers.

        Args:
            center: Of the centered rows, or of the rows as they are.
        """
        gram, record = self.gram(center)
        return finish_spectrum(eigenvalues(gram), record)

    @full_precision
    def gram(self, center: bool = True) -> tuple[Tensor, Spectrum]:
        """Gram matrix ``(D, D)`` and unfinished record, see :func:`~lightning_collapse.spectral.spectrum.gram_of`."""
        centered = self.about(self.mean)
        gram, mean = centered.second, centered.shift
        record = Spectrum(torch.ones_like(self.count), self.count, len(mean))
        if not center:
            return gram + self.count * torch.outer(mean, mean), record
        kurtosis = relative_to_square(centered.quartic, gram.trace())
        varies = gram.diagonal() > self.count * (RESOLUTION * mean).square()
        gram = gram * (varies.unsqueeze(1) & varies)
        variance = gram.diagonal() / (self.count - 1).clamp_min(1)
        return gram, replace(record, kurtosis=kurtosis, mean=mean, variance=variance)


def reduce_moments(moments: Sequence[Moments], group: dist.ProcessGroup | None = None) -> list[Moments]:
    """Reduce several accumulators at once, see :meth:`Moments.reduce`.

    Collective: every process must call it, with the same widths in the same order; two all-reduces in all.

    Example:
        >>> moments = Moments(dim=2)
        >>> moments.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        >>> [total] = reduce_moments([moments])  # of one process here
        >>> total.count, total.mean
        (tensor(2., dtype=torch.float64), tensor([2., 2.], dtype=torch.float64))
    """
    firsts = [torch.cat([m.seen[None], m.count[None], m.count * m.shift + m.total]) for m in moments]
    firsts = _all_reduce(firsts, group)
    moved = [m.about(first[2:] / first[1].clamp_min(1)) for m, first in zip(moments, firsts, strict=True)]
    rests = [torch.cat([m.total, m.cubic, m.quartic[None], m.second.flatten()]) for m in moved]
    reduced = []
    for m, first, rest in zip(moved, firsts, _all_reduce(rests, group), strict=True):
        total, cubic, quartic, second = torch.split(rest, [len(m.shift), len(m.shift), 1, m.second.numel()])
        reduced.append(
            Moments.from_states(
                {
                    "seen": first[0],
                    "count": first[1],
                    "shift": m.shift,
                    "total": total,
                    "second": second.view_as(m.second),
                    "cubic": cubic,
                    "quartic": quartic[0],
                }
            )
        )
    return reduced


def _all_reduce(parts: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    return list(torch.split(all_reduce_sum(torch.cat(parts), group), [len(part) for part in parts]))
