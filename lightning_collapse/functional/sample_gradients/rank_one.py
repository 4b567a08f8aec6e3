"""Rank-one share (gradient coherence): how much of the Fisher information lies along the mean gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def rank_one_share(square_of_mean: Tensor, mean_square: Tensor, count: int | Tensor) -> Tensor:
    r"""Share of the trace of the Fisher information that a rank-one one along the mean gradient keeps, unbiased.

    .. math:: R = \frac{\|\mathbb{E} g\|^2}{\mathbb{E}\|g\|^2}, \qquad
        \hat R = \frac{\sum_k \big(N_k \|\hat\mu_k\|^2 - m_k\big) / (N_k - 1)}{\sum_k m_k}, \quad
        \hat\mu_k = \frac{1}{N_k} \sum_n g_{kn}, \quad m_k = \frac{1}{N_k} \sum_n \|g_{kn}\|^2

    The mean of N samples alone reads :math:`R + (1 - R) / N`, 1/N where gradients have nothing in common: the
    numerator takes that out. Of several points ``k`` numerator and denominator are averaged before they are divided,
    as a mean of ratios is biased where norms differ.

    Args:
        square_of_mean: :math:`\|\hat\mu\|^2`, 0-dimensional or of one point each, shape ``(K,)``.
        mean_square: :math:`m`, of the same shape.
        count: :math:`N`, of one or of each point, over all processes.

    Returns:
        0-dimensional, at most 1, for collinear gradients of one length, about 0 if they cancel, down to
        ``-1 / (N - 1)`` by chance; NaN for fewer than two samples, or where all gradients are zero.

    Raises:
        ValueError: If shapes differ.

    References:
        The decomposition is that of Wang et al., *Avoid Catastrophic Forgetting with Rank-1 Fisher from Diffusion
        Models*, ICLR 2026, https://arxiv.org/abs/2509.23593; the correction is ours, that of a U-statistic.

    Example:
        >>> gradients = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
        >>> square_of_mean, mean_square = gradients.mean(dim=0).square().sum(), gradients.square().sum(dim=1).mean()
        >>> rank_one_share(square_of_mean, mean_square, 4)  # (4 * 1 - 2) / 3 / 2; the plain ratio is 0.5
        tensor(0.3333)
    """
    if square_of_mean.shape != mean_square.shape or square_of_mean.ndim > 1:
        raise ValueError(
            f"`square_of_mean` and `mean_square` must have one shape, () or (K,), got {tuple(square_of_mean.shape)} and"
            f" {tuple(mean_square.shape)}."
        )
    samples = torch.as_tensor(count, dtype=mean_square.dtype, device=mean_square.device)
    if samples.ndim and samples.shape != mean_square.shape:
        raise ValueError(
            f"`count` must be a number, or one for each of {tuple(mean_square.shape)} points, got shape"
            f" {tuple(samples.shape)}."
        )
    numerator = (samples * square_of_mean - mean_square) / (samples - 1)
    share: Tensor = numerator.sum() / mean_square.sum()
    return torch.where((samples < 2).any(), torch.nan, share)
