"""Weight change: how far a matrix has moved from where it began, in which directions, and from which rank."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvectors
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.arguments import require_whole


@torch.no_grad()
@full_precision
def relative_weight_change(weight: Tensor, reference: Tensor) -> Tensor:
    r"""Distance from the initial weight in units of its norm, :math:`\|W_t - W_0\|_F / \|W_0\|_F`.

    Near 0 in lazy training, whose wide networks hardly move; the authors of [1] report it without the denominator.

    Args:
        weight: Any shape.
        reference: Same shape.

    Returns:
        0-dimensional, 0 or more; infinite or NaN for a reference of zeros.

    Raises:
        ValueError: If the shapes differ.

    References:
        [1] Liu et al., ICLR 2024. https://arxiv.org/abs/2310.08513

    Example:
        >>> relative_weight_change(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
        tensor(0.5000)
    """
    if weight.shape != reference.shape:
        raise ValueError(f"`reference` must have the shape of `weight`, {tuple(weight.shape)}, got {reference.shape}.")
    change: Tensor = torch.linalg.vector_norm(weight - reference) / torch.linalg.vector_norm(reference)
    return change


@torch.no_grad()
@full_precision
def null_space_share(update: Tensor, inputs: Tensor) -> Tensor:
    r"""Share of an update that no input can see: of :math:`\|\Delta W\|_F^2`, what lies outside the span of the inputs.

    .. math:: 1 - \frac{\|\Delta W P\|_F^2}{\|\Delta W\|_F^2}, \quad P \text{ the projection on the row space of } A

    Gradients lie in the span of the inputs they were made from, so plain gradient descent on these inputs reads 0;
    weight decay and elementwise rules such as Adam's do not stay there. An update in a random direction reads
    ``1 - rank / i``. Directions below ``1e-6`` of the largest singular value count as unseen.

    Args:
        update: Shape ``(o, i)``.
        inputs: Rows ``A``, shape ``(n, i)``.

    Returns:
        Two numbers, ``(2,)``, 0 to 1: the share, and that of a random update; the first is NaN for an update of zeros.
        ``float64`` where the device has it.

    Raises:
        ValueError: If the widths differ.

    Example:
        >>> null_space_share(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.6400, 0.5000], dtype=torch.float64)
    """
    if update.ndim != 2 or inputs.ndim != 2 or update.shape[1] != inputs.shape[1]:
        raise ValueError(
            f"`update` and `inputs` must have shapes (o, i) and (n, i), got {tuple(update.shape)} and"
            f" {tuple(inputs.shape)}."
        )
    dtype = accumulation_dtype(update.device)
    update, rows = update.to(dtype), inputs.to(dtype)
    few = len(rows) <= rows.shape[1]
    values, vectors = eigenvectors(rows @ rows.T if few else rows.T @ rows)
    seen = values > max(1e-12, len(values) * torch.finfo(dtype).eps) * values[:1]
    # of fewer rows than columns the basis is A'u / sigma
    basis = rows.T @ vectors / torch.where(seen, values, 1.0).sqrt() if few else vectors
    inside = ((update @ basis).square() * seen).sum()
    total = update.square().sum()
    share = torch.where(total > 0, (1 - inside / total).clamp(0, 1), torch.nan)
    return torch.stack([share, 1 - seen.sum().to(dtype) / rows.shape[1]])


@torch.no_grad()
@full_precision
def low_rank_weight(weight: Tensor, rank: int) -> Tensor:
    r"""A weight to begin from of lower rank and equal norm: truncated, and rescaled to the same Frobenius norm.

    Its rank is what [1] call the effective rank of initial weights: the lower, the richer the training, unless what is
    left is aligned with the task already.

    Args:
        weight: As drawn, shape ``(o, i)``.
        rank: How many singular values are kept.

    Returns:
        Same shape and norm, of that rank or that of ``weight``.

    Raises:
        ValueError: If ``weight`` is no matrix, or ``rank`` no positive integer.

    References:
        [1] Liu et al., ICLR 2024. https://arxiv.org/abs/2310.08513

    Example:
        >>> low_rank_weight(torch.diag(torch.tensor([4.0, 3.0])), 1)
        tensor([[5., 0.],
                [0., 0.]])
    """
    require_whole(1, rank=rank)
    if weight.ndim != 2:
        raise ValueError(f"`weight` must be a matrix (o, i), got shape {tuple(weight.shape)}.")
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    kept = values[:rank]
    scale = values.norm() / kept.norm().clamp_min(torch.finfo(kept.dtype).tiny)
    low: Tensor = (left[:, :rank] * (kept * scale)) @ right[:rank]
    return low


@torch.no_grad()
@full_precision
def outlying_singular_values(singular_values: Tensor, tolerance: float = 0.01) -> Tensor:
    r"""Number of singular values that have left the bulk: further than ``tolerance`` from the median, relatively.

    In deep linear networks that begin at scaled orthogonal matrices and learn a target of rank ``r``, each layer moves
    in a subspace of ``2 r`` dimensions (``r`` values rise, ``r`` fall), and all others stay equal. **For square weights
    that began near-orthogonal only**: of Gaussian ones the bulk itself is wide. The rank of the update does not tell.

    Args:
        singular_values: Shape ``(..., K)``.
        tolerance: Relative distance that counts.

    Returns:
        Shape ``(...)``, 0 to ``K``.

    References:
        Yaras et al., *The law of parsimony in gradient descent for learning deep linear networks*, 2023,
        https://arxiv.org/abs/2306.01154

    Example:
        >>> outlying_singular_values(torch.tensor([3.0, 1.0, 1.0, 1.0, 0.9]))
        tensor(2)
    """
    middle = singular_values.quantile(0.5, dim=-1, keepdim=True)
    return ((singular_values - middle).abs() > tolerance * middle).sum(dim=-1)
