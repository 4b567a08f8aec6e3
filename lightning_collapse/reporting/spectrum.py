"""Spectrum histogram: that of a layer, with fixed edges, comparable between steps, layers and runs."""

from math import sqrt

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision

_BINS_PER_DECADE = 4  # a power of two: scaling by it is exact, so the bins are those of a search in `LOG10_EDGES`
_LOWEST, _HIGHEST = -8, 4

LOG10_EDGES = tuple(i / _BINS_PER_DECADE for i in range(_LOWEST * _BINS_PER_DECADE, _HIGHEST * _BINS_PER_DECADE + 1))
"""Edges of the bins of :func:`log10_histogram`: quarters of a decade from 1e-8 to 1e4."""


@full_precision
def log10_histogram(singular_values: Tensor, n: Tensor | int) -> Tensor:
    r"""Count the principal axes by the base-10 logarithm of the standard deviation along them.

    .. math:: \log_{10} \frac{\sigma_i}{\sqrt{n - 1}}

    Collapse shows as mass that wanders to the left, dimensional collapse as a second hump that splits off. Runs on the
    device of ``singular_values`` without a host synchronization.

    Args:
        singular_values: Of centered features, shape ``(..., K)``.
        n: Number of rows behind them, at least 2; a tensor has shape ``(...)``.

    Returns:
        Counts between :data:`LOG10_EDGES`, shape ``(..., 48)``, at least ``float32``. The end bins also count what
        lies outside, the lowest the zeros; NaN is not counted.

    Example:
        >>> counts = log10_histogram(torch.tensor([30.0, 3.0, 0.0]), n=10)
        >>> [edge for edge, count in zip(LOG10_EDGES, counts) if count]
        [-8.0, 0.0, 1.0]
    """
    # one row leaves only zeros, which divided by zero would be NaN
    scale = (n - 1).clamp_min(1).to(singular_values.dtype).sqrt() if isinstance(n, Tensor) else sqrt(max(n - 1, 1))
    quarters = ((singular_values.movedim(-1, 0) / scale).log10() * _BINS_PER_DECADE).floor()
    first, last = _LOWEST * _BINS_PER_DECADE, _HIGHEST * _BINS_PER_DECADE - 1
    bins = torch.arange(first, last + 1, device=quarters.device)
    # compared rather than `bincount`ed, which synchronizes; NaN equals no bin
    return (quarters.clamp(first, last).unsqueeze(-1) == bins).sum(dim=0, dtype=quarters.dtype)
