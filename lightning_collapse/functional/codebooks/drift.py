"""Codebook drift: how far codes move, which rows change theirs, and how well codes fit what the encoder returns."""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision


class QuantizationReading(NamedTuple):
    r"""What :func:`quantization_reading` returns, 0-dimensional each.

    Attributes:
        error: :math:`\sum \lVert z - e \rVert^2 / \sum \lVert z - \bar z \rVert^2`: 0 (codes are the rows) to 1
            (no better than the mean), or above; NaN where all rows are equal.
        scale: Root mean square of rows over that of their codes, 1 where they fit; NaN where all codes are zero.
        n: Rows.
    """

    error: Tensor
    scale: Tensor
    n: Tensor


def quantization_sums(rows: Tensor, codes: Tensor) -> Tensor:
    r"""What adds up over batches and processes, for :func:`quantization_reading`.

    Args:
        rows: What the encoder returned, ``(N, D)``. Rows with NaN or infinity are left out.
        codes: The code of each, ``(N, D)``.

    Returns:
        Shape ``(4 + D,)``, double precision where there is any: rows, and the sums of :math:`\lVert z - e \rVert^2`,
        :math:`\lVert z \rVert^2`, :math:`\lVert e \rVert^2` and :math:`z`.

    Example:
        >>> quantization_sums(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [3.0]]))
        tensor([ 2.,  1., 10.,  9.,  4.], dtype=torch.float64)
    """
    dtype = accumulation_dtype(rows.device)
    kept = (rows.isfinite() & codes.isfinite()).all(dim=1, keepdim=True)
    z, e = (torch.where(kept, x.detach().to(dtype), 0) for x in (rows, codes))
    sums = torch.stack([kept.sum().to(dtype), (z - e).square().sum(), z.square().sum(), e.square().sum()])
    return torch.cat([sums, z.sum(dim=0)])


def quantization_reading(sums: Tensor) -> QuantizationReading:
    """Quantization error and scale of the encoder from what :func:`quantization_sums` added up.

    An encoder whose scale runs away from its codes leaves all but a few of them without a row.

    Example:
        >>> rows, codes = torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([[0.0], [0.0], [4.0], [4.0]])
        >>> round(quantization_reading(quantization_sums(rows, codes)).error.item(), 3)
        0.2
    """
    n, error, z, e = sums[:4].unbind()
    scatter = z - sums[4:].square().sum() / n
    return QuantizationReading(
        torch.where(scatter > 1e-12 * z, error / scatter, nan), torch.where(e > 0, z / e, nan).sqrt(), n
    )


def churn(before: Tensor, now: Tensor) -> Tensor:
    """Share of a fixed set of rows whose code has changed: 0 where codes have settled, near 1 where they were replaced.

    Example:
        >>> churn(torch.tensor([3, 1, 4, 1]), torch.tensor([3, 1, 4, 2]))
        tensor(0.2500)
    """
    return (before != now).float().mean()


@full_precision
def codebook_motion(before: Tensor, now: Tensor, counts: Tensor) -> Tensor:
    r"""How far codes have moved, over their lengths, weighted by their hits.

    .. math:: \sum_k c_k \lVert e'_k - e_k \rVert / \lVert e_k \rVert \Big/ \sum_k c_k

    Args:
        before: Codes ``(K, D)``.
        now: Codes ``(K, D)`` later.
        counts: Choices of each in between, ``(K,)``.

    Returns:
        0-dimensional, 0 or above; NaN without a choice.

    Example:
        >>> codebook_motion(torch.eye(2), torch.tensor([[1.0, 0.5], [0.0, 9.0]]), torch.tensor([4, 0]))
        tensor(0.5000)
    """
    length = torch.linalg.vector_norm(before, dim=1).clamp_min(torch.finfo(before.dtype).tiny)
    weight = counts.to(before.dtype)
    motion: Tensor = (torch.linalg.vector_norm(now - before, dim=1) / length * weight).sum() / weight.sum()
    return motion


@full_precision
def moved_idle_codes(before: Tensor, now: Tensor, counts: Tensor) -> Tensor:
    """How many codes were put elsewhere: those hardly used before that moved half the codebook's spread, or more.

    Hardly used is less than a twentieth of the mean. A code that nothing chooses gets no gradient and no mean, so that
    one which moves half of the larger spread of both was reset; not so where all codes pass through a matrix, as in
    SimVQ. Codes that were still used when they were reset are not told from others.

    Args:
        before: Codes ``(K, D)``.
        now: Codes ``(K, D)`` later.
        counts: Choices of each in the window that ended with ``before``, ``(K,)``.

    Returns:
        0-dimensional, whole numbers.

    Example:
        >>> before = torch.tensor([[0.0, 1.0], [1.0, 0.0], [9.0, 9.0]])
        >>> moved_idle_codes(before, torch.tensor([[0.1, 1.0], [1.0, 0.1], [0.5, 0.5]]), torch.tensor([50, 50, 0]))
        tensor(1)
    """
    weight = counts.to(before.dtype)
    idle = weight < weight.mean() / 20
    moved = torch.linalg.vector_norm(now - before, dim=1)
    spreads = torch.stack([(of - of.mean(dim=0)).square().sum(dim=1).mean().sqrt() for of in (before, now)])
    count: Tensor = (idle & (moved > spreads.amax() / 2)).sum()
    return count
