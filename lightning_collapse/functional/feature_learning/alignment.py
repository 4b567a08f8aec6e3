"""Kernel and representation alignment: how far what a network computes on fixed samples has moved since it was made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.arguments import require_whole


class KernelAlignment(NamedTuple):
    """Cosines of two Gram matrices of the same samples; each 0-dimensional, NaN for a matrix that is zero.

    Attributes:
        uncentred: As published. Near 1 is no sign of laziness: unrelated networks read 0.86 to 0.99.
        centred: Of rows and columns without their means (linear CKA).
        off_diagonal: Of what is off the diagonal: without what every kernel has in common.
        debiased: Off the diagonal and U-centred (unbiased CKA): 0 on average for unrelated kernels.
    """

    uncentred: Tensor
    centred: Tensor
    off_diagonal: Tensor
    debiased: Tensor


class SignSimilarity(NamedTuple):
    """Agreement of signs, each 0-dimensional.

    Attributes:
        share: Of entries with equal signs.
        null: What signs independent in both, of units that are as often positive, would agree in.
    """

    share: Tensor
    null: Tensor


@torch.no_grad()
@full_precision
def kernel_alignment(first: Tensor, second: Tensor) -> KernelAlignment:
    r"""Four cosines of two Gram matrices, :math:`\langle K, L \rangle / (\|K\| \, \|L\|)`.

    Of representations (:math:`K = H H^\top`) or of tangent kernels, now and at the beginning: lazy training leaves
    both as they were. The published cosine is near 1 of unrelated networks as well, since all kernels have a large
    diagonal and features a common mean; :func:`kernel_alignment_null` says how near. The two forms without a diagonal
    can tell; the last one is also free of a common mean,

    .. math:: \tilde K_{ij} = K_{ij} - \frac{\sum_l K_{il} + \sum_l K_{lj}}{n - 2}
        + \frac{\sum_{kl} K_{kl}}{(n - 1)(n - 2)}, \quad \tilde K_{ii} = 0, \text{ sums off the diagonal}

    Args:
        first: Symmetric, shape ``(n, n)``.
        second: Same shape.

    Returns:
        Four numbers of -1 to 1 (of Gram matrices the first two are 0 or more), ``float64`` where the device has it; the
        third needs 2 samples, the last one 4.

    Raises:
        ValueError: If the shapes are not square and equal.

    References:
        Liu et al., *How connectivity structure shapes rich and lazy learning in neural circuits*, ICLR 2024,
        https://arxiv.org/abs/2310.08513 (uncentred); Kornblith et al., ICML 2019, https://arxiv.org/abs/1905.00414
        (centred); Székely & Rizzo, 2014, https://arxiv.org/abs/1310.2926 (U-centring).

    Example:
        >>> gram = torch.arange(16.0).view(4, 4).square()
        >>> [round(value.item(), 3) for value in kernel_alignment(gram + gram.T, 2 * (gram + gram.T))]
        [1.0, 1.0, 1.0, 1.0]
    """
    n = len(first)
    if first.ndim != 2 or first.shape != (n, n) or second.shape != first.shape:
        raise ValueError(
            f"Two Gram matrices of the same samples have equal shapes (n, n), got {tuple(first.shape)} and"
            f" {tuple(second.shape)}."
        )
    dtype = accumulation_dtype(first.device)
    both = torch.stack([first, second]).to(dtype)
    rows = both.mean(dim=2, keepdim=True)
    off = both * (1 - torch.eye(n, dtype=dtype, device=both.device))
    sums = off.sum(dim=2, keepdim=True)
    total = sums.sum(dim=1, keepdim=True)
    debiased = off - (sums + sums.mT) / max(n - 2, 1) + total / max((n - 1) * (n - 2), 1)
    debiased = debiased * (off.new_ones(n, n).fill_diagonal_(0) if n > 3 else torch.nan)
    centred = both - rows - rows.mT + rows.mean(dim=1, keepdim=True)
    return KernelAlignment(*(_cosine(*pair) for pair in (both, centred, off, debiased)))


def kernel_alignment_null(
    first: Tensor, second: Tensor, permutations: int = 20, seed: int = 0
) -> tuple[KernelAlignment, KernelAlignment]:
    """What :func:`kernel_alignment` reads when the samples of one kernel are dealt anew.

    That is the reading of kernels which have nothing to do with each other but their diagonals and means. Networks that
    see the same inputs agree in more than that; compare with a network that was made anew where that matters.

    Args:
        first: Symmetric, shape ``(n, n)``.
        second: Same shape; its samples are dealt.
        permutations: How many deals, at least 2.
        seed: Of the deals; no global random number is drawn.

    Returns:
        Means and standard deviations over the deals.

    Raises:
        ValueError: As of :func:`kernel_alignment`, or if ``permutations`` is too small.

    Example:
        >>> rows = torch.randn(50, 500, generator=torch.Generator().manual_seed(0)).relu()
        >>> mean, deviation = kernel_alignment_null(rows @ rows.T, rows @ rows.T)
        >>> round(mean.uncentred.item(), 2), abs(mean.debiased.item()) < 0.05
        (0.98, True)
    """
    require_whole(2, permutations=permutations)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(permutations):
        order = torch.randperm(len(second), generator=generator).to(second.device)
        found.append(torch.stack(kernel_alignment(first, second[order][:, order])))
    deals = torch.stack(found)
    return KernelAlignment(*deals.mean(dim=0)), KernelAlignment(*deals.std(dim=0))


def representation_alignment(features: Tensor, reference: Tensor) -> KernelAlignment:
    r""":func:`kernel_alignment` of the Gram matrices :math:`H H^\top` of two representations of the same samples.

    Args:
        features: Shape ``(n, ...)``; what belongs to one sample is one long row.
        reference: Shape ``(n, ...)``, of any other width.

    Returns:
        Four cosines; an orthogonal map and a scale leave all of them at 1.

    Raises:
        ValueError: If the numbers of samples differ.

    Example:
        >>> rows = torch.eye(5)[:, :3]
        >>> round(representation_alignment(rows, -2 * rows.flip(1)).uncentred.item(), 6)
        1.0
    """
    grams = [_gram(rows.flatten(1)) for rows in (features, reference)]
    return kernel_alignment(grams[0], grams[1])


@torch.no_grad()
def sign_similarity(features: Tensor, reference: Tensor) -> SignSimilarity:
    """Share of activities whose sign is what it was: 1 if no gate has changed, near ``null`` if none is left.

    Args:
        features: Shape ``(n, ...)``, or ``bool`` for what was positive.
        reference: Same shape, likewise.

    Returns:
        The share and its null, 0 to 1, ``float32``; NaN for no entries.

    Raises:
        ValueError: If the shapes differ.

    References:
        Liu et al., ICLR 2024. https://arxiv.org/abs/2310.08513; the null is ours.

    Example:
        >>> sign_similarity(torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([[1.0], [-2.0], [-3.0]])).share
        tensor(0.6667)
    """
    if features.shape != reference.shape:
        raise ValueError(
            f"Activities of the same samples have equal shapes, got {tuple(features.shape)} and"
            f" {tuple(reference.shape)}."
        )
    first, second = features > 0, reference > 0
    p, q = (positive.float().mean(dim=0) for positive in (first, second))
    return SignSimilarity((first == second).float().mean(), (p * q + (1 - p) * (1 - q)).mean())


@full_precision
def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.T


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    norms = first.norm() * second.norm()
    # a matrix whose centre is all there is leaves rounding
    return torch.where(norms > 0, (first * second).sum() / norms, torch.nan)
