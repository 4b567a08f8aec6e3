"""Entry moments: anchored powers, extremes and a log histogram of all numbers of a stream, additive over its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.spectral.deterministic import running_sum
from lightning_collapse.spectral.named_states import NamedStates
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.distributed import all_reduce_max, all_reduce_sum

ENTRY_STATES = ("seen", "count", "anchor", "powers", "squares", "largest", "histogram")
_OCTAVES = (-64, 64)
_MANTISSA = 4  # leading bits of the mantissa: 16 bins per octave, none wider than a sixteenth of its lower edge
BINS = (_OCTAVES[1] - _OCTAVES[0]) << _MANTISSA
_FIRST, _SHIFT = (127 + _OCTAVES[0]) << _MANTISSA, 23 - _MANTISSA  # in the bits of a float32


class EntryMoments(NamedStates):
    r"""Sufficient statistics of the numbers of a layer: what outliers are told by streams, merges and reduces.

    Of all numbers about an anchor :math:`a` the sums :math:`\sum (x - a)^k`, ``k`` from 1 to 4, so that a mean of many
    standard deviations costs no digits; per neuron :math:`\sum x^2` and :math:`\max |x|`; and how many magnitudes are
    in each of 2,048 bins, sixteen per octave from :math:`2^{-64}` to :math:`2^{64}`, for quantiles and shares beyond
    thresholds that are known only in the end. Sums and counts add up, extremes are compared, and nothing else crosses
    between batches or processes; so any split gives the same.

    Rows with NaN or infinity are left out and counted. Nothing here waits for the device.

    Args:
        dim: Number of neurons ``D``.
        device: Where the sums live.
        dtype: What they are summed in; the default is ``float64`` wherever the device has it.

    Attributes:
        seen: Rows offered and not masked, 0-dimensional.
        count: Finite ones among them, 0-dimensional.
        anchor: Mean of the numbers so far, 0-dimensional.
        powers: Sums of the first four powers of what is left of them without it, ``(4,)``.
        squares: Sum of the squares of every neuron, ``(D,)``.
        largest: Largest magnitude of every neuron, ``(D,)``.
        histogram: Magnitudes in each bin, ``(2048,)``; the first holds what is below :math:`2^{-64}`, zeros too.

    Example:
        >>> moments = EntryMoments(2)
        >>> moments.update(torch.tensor([[1.0, -4.0], [2.0, 0.0]]))
        >>> moments.largest, moments.squares
        (tensor([2., 4.], dtype=torch.float64), tensor([ 5., 16.], dtype=torch.float64))
    """

    names = ENTRY_STATES

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype or accumulation_dtype(device), device=device)

        self.seen, self.count, self.anchor = zeros(), zeros(), zeros()
        self.powers, self.squares, self.largest, self.histogram = zeros(4), zeros(dim), zeros(dim), zeros(BINS)

    @property
    def entries(self) -> Tensor:
        """How many numbers there were, 0-dimensional."""
        return self.count * len(self.squares)

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add rows.

        Args:
            features: Shape ``(N, D)``, any floating dtype.
            mask: Boolean, shape ``(N,)``: rows to count, for instance tokens that are not padding.

        Raises:
            ValueError: If ``features`` is not a matrix of width ``D``.
        """
        if features.ndim != 2 or features.shape[1] != len(self.squares):
            raise ValueError(
                f"`features` must have shape (N, {len(self.squares)}), got {tuple(features.shape)}."
                " Flatten tokens or the positions of maps first."
            )
        if len(features):
            merged = self.merge(self._of_batch(features, mask)).states()
            for name, state in merged.items():
                setattr(self, name, state)

    def merge(self, other: EntryMoments) -> EntryMoments:
        """Statistics of both streams together."""
        entries = self.entries + other.entries
        means = self.entries * self.mean + other.entries * other.mean
        anchor = means / entries.clamp_min(1)
        own = {"anchor": anchor, "powers": self.about(anchor) + other.about(anchor)}
        own["largest"] = torch.maximum(self.largest, other.largest)
        added = {name: getattr(self, name) + getattr(other, name) for name in ENTRY_STATES if name not in own}
        return self.from_states(added | own)

    def reduce(self, group: torch.distributed.ProcessGroup | None = None) -> EntryMoments:
        """Statistics of all processes together. Collective: every process must call it, with the same ``D``."""
        [reduced] = reduce_entries([self], group)
        return reduced

    def quantile(self, share: float) -> Tensor:
        """Magnitude below which so large a share of the numbers is, right to a thirty-second or better."""
        widths = _edges(self.histogram).diff()
        before = running_sum(self.histogram) - self.histogram
        # bins below are passed whole, bins above not at all
        inside = ((share * self.entries - before) / self.histogram.clamp_min(1e-9)).clamp(0, 1)
        return torch.where(self.entries > 0, (inside * widths).sum(), torch.nan)

    def below(self, magnitude: Tensor) -> Tensor:
        """How many magnitudes are below a 0-dimensional one, those below :math:`2^{-64}` left out."""
        edges = _edges(self.histogram)
        passed = ((magnitude - edges[:-1]) / edges.diff()).clamp(0, 1)
        return (self.histogram * passed)[1:].sum()

    @property
    def mean(self) -> Tensor:
        """Mean of all numbers, 0-dimensional."""
        return self.anchor + self.powers[0] / self.entries.clamp_min(1)

    def about(self, anchor: Tensor) -> Tensor:
        """The sums of powers about another anchor."""
        n, (s1, s2, s3, s4), d = self.entries, self.powers.unbind(), anchor - self.anchor
        first = s1 - n * d
        second = s2 - 2 * d * s1 + n * d**2
        third = s3 - 3 * d * s2 + 3 * d**2 * s1 - n * d**3
        fourth = s4 - 4 * d * s3 + 6 * d**2 * s2 - 4 * d**3 * s1 + n * d**4
        return torch.stack([first, second, third, fourth])

    @full_precision
    def _of_batch(self, features: Tensor, mask: Tensor | None) -> EntryMoments:
        wide = self.powers.dtype
        rows, seen, kept = finite_rows(features, mask)
        count, dim = kept.sum(dtype=wide), rows.shape[1]
        largest = rows.abs().amax(dim=0)
        # in these units no power leaves the range of float32, and to divide by a power of two rounds nothing
        scale = torch.ldexp(torch.ones_like(largest[0]), torch.frexp(largest.max()).exponent)
        units = rows / scale
        squares = units.square().sum(dim=0)
        mean = units.sum() / (count * dim).clamp_min(1).to(units)
        units = units.sub_(mean).mul_(kept.unsqueeze(1))
        second = units.square()
        powers = [units.sum(), second.sum(), units.mul_(second).sum(), second.square_().sum()]
        size = scale.to(wide)
        histogram = _histogram(rows).to(wide)
        histogram[0] -= (len(rows) - count) * dim  # rows that do not count are zeros
        exponents = torch.arange(1, 5, device=size.device, dtype=wide)
        return self.from_states(
            {
                "seen": seen.to(wide),
                "count": count,
                "anchor": mean.to(wide) * size,
                "powers": torch.stack(powers).to(wide) * size**exponents,
                "squares": squares.to(wide) * size**2,
                "largest": largest.to(wide),
                "histogram": histogram,
            }
        )


def reduce_entries(
    moments: Sequence[EntryMoments], group: torch.distributed.ProcessGroup | None = None
) -> list[EntryMoments]:
    """Reduce several accumulators at once, see :meth:`EntryMoments.reduce`.

    Collective: every process must call it, with the same widths in the same order; three all-reduces in all, of
    2 D + 2,055 numbers a stream.

    Example:
        >>> moments = EntryMoments(1)
        >>> moments.update(torch.tensor([[1.0], [5.0]]))
        >>> reduce_entries([moments])[0].mean
        tensor(3., dtype=torch.float64)
    """
    additive = ("seen", "count", "squares", "histogram")
    sums, means = [], []
    for m in moments:
        sums.append(torch.cat([getattr(m, name).reshape(-1) for name in additive]))
        means.append(m.entries * m.mean)
    total = all_reduce_sum(torch.cat([*sums, torch.stack(means)]), group)
    largest = all_reduce_max(torch.cat([m.largest for m in moments]), group)
    *parts, means_ = torch.split(total, [*map(len, sums), len(means)])
    reduced = []
    for m, part, mean in zip(moments, parts, means_.unbind(), strict=True):
        sizes = [1, 1, len(m.squares), BINS]
        seen, count, squares, histogram = torch.split(part, sizes)
        anchor = mean / (count[0] * len(squares)).clamp_min(1)
        states = {"seen": seen[0], "count": count[0], "squares": squares, "histogram": histogram}
        reduced.append(EntryMoments.from_states(states | {"anchor": anchor, "powers": m.powers, "largest": m.largest}))
    powers = all_reduce_sum(torch.stack([m.about(r.anchor) for m, r in zip(moments, reduced, strict=True)]), group)
    extremes = torch.split(largest, [len(m.largest) for m in moments])
    for r, own, extreme in zip(reduced, powers.unbind(), extremes, strict=True):
        r.powers, r.largest = own, extreme
    return reduced


def _histogram(rows: Tensor) -> Tensor:
    """How many magnitudes are in each bin; floating-point numbers are ordered as their bits are."""
    bits = rows.abs().to(torch.float32).flatten().view(torch.int32)
    bins = (bits >> _SHIFT).sub_(_FIRST).clamp_(0, BINS - 1)
    # not `bincount`, which waits for the device
    counts = torch.zeros(BINS, dtype=torch.int64, device=rows.device)
    return counts.index_add_(0, bins, torch.ones((), dtype=torch.int64, device=rows.device).expand(len(bins)))


def _edges(like: Tensor) -> Tensor:
    """Edges of the bins, ``(2049,)``; the first is 0."""
    steps = torch.arange(BINS + 1, device=like.device)
    mantissa = 1 + (steps % (1 << _MANTISSA)).to(like.dtype) / (1 << _MANTISSA)
    edges = torch.ldexp(mantissa, steps // (1 << _MANTISSA) + _OCTAVES[0])
    edges[0] = 0
    return edges
