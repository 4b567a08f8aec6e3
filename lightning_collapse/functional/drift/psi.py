"""Population stability index (PSI): the divergence of two histograms with the quantiles of a reference for edges."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def psi(reference: Tensor, now: Tensor, bins: int = 10) -> Tensor:
    r"""Population stability index, :math:`\sum_b (p_b - q_b) \ln(p_b / q_b)`, with one half added to every count.

    The usual limits of 0.1 and 0.25 know nothing of the numbers of rows: compare with :func:`psi_null`.

    Args:
        reference: Sorted, ``(..., n)``: of each direction the projections of the rows.
        now: Sorted, ``(..., m)``.
        bins: As likely as each other in the reference.

    Returns:
        ``(...)``, 0 to infinity.

    Example:
        >>> psi(torch.arange(100.0), torch.arange(100.0)), psi(torch.arange(100.0), torch.arange(50.0), bins=2)
        (tensor(0.), tensor(2.2623))
    """
    n, m = reference.shape[-1], now.shape[-1]
    # the first value of the next bin: with `right=False` below it counts there
    firsts = torch.tensor([round(n * b / bins) for b in range(1, bins)], device=reference.device)
    edges = reference.index_select(-1, firsts).contiguous()
    counts = [_counts(of, edges) + 0.5 for of in (reference, now)]
    p, q = counts[0] / (n + bins / 2), counts[1] / (m + bins / 2)
    return ((p - q) * (p / q).log()).sum(dim=-1)


def psi_null(n: int, m: int, bins: int = 10) -> float:
    """Mean of :func:`psi` for two samples of one law, ``(bins - 1) (1/n + 1/m)``, of many rows in every bin.

    Example:
        >>> round(psi_null(1000, 1000), 4)
        0.018
    """
    return (bins - 1) * (1 / n + 1 / m)


def psi_p_value(statistic: Tensor, n: int, m: int, bins: int = 10) -> Tensor:
    r"""Probability of an index like this or above for two samples of one law.

    Over :math:`1/n + 1/m` it is :math:`\chi^2` then, with ``bins - 1`` degrees of freedom.

    Example:
        >>> round(psi_p_value(torch.tensor(0.0338), 1000, 1000).item(), 2)
        0.05
    """
    half = torch.as_tensor((bins - 1) / 2, dtype=statistic.dtype, device=statistic.device)
    p: Tensor = torch.special.gammaincc(half, statistic.clamp_min(0) / (2 * (1 / n + 1 / m)))
    return p


def _counts(values: Tensor, edges: Tensor) -> Tensor:
    """How many of sorted values are in each bin."""
    below = torch.searchsorted(values.contiguous(), edges).to(values.dtype)
    ends = torch.zeros_like(below[..., :1]), torch.full_like(below[..., :1], values.shape[-1])
    return torch.cat([ends[0], below, ends[1]], dim=-1).diff(dim=-1)
