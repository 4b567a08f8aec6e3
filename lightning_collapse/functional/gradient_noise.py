"""Gradient noise scale and coherence, from norms of gradients on batches of two sizes."""

from typing import NamedTuple

import torch
from torch import Tensor


class GradientNoise(NamedTuple):
    r"""Unbiased estimates behind the gradient noise scale.

    Attributes:
        trace: Of :math:`\operatorname{tr} \Sigma`, the noise in the gradient of one sample.
        signal: Of :math:`|G|^2`, the true gradient. May be negative where noise dominates: averaging needs that.
        scale: Their ratio, in samples; biased from a single step, see :func:`gradient_noise_scale`.
    """

    trace: Tensor
    signal: Tensor
    scale: Tensor


def gradient_noise_scale(
    small_norm_sq: Tensor, big_norm_sq: Tensor, small_batch: float | Tensor, big_batch: float | Tensor
) -> GradientNoise:
    r"""Simple noise scale :math:`B = \operatorname{tr} \Sigma / |G|^2`: where larger batches cease to pay.

    .. math::
        |G|^2 &\approx \frac{b_2 |g_2|^2 - b_1 |g_1|^2}{b_2 - b_1} \\
        \operatorname{tr} \Sigma &\approx \frac{|g_1|^2 - |g_2|^2}{1 / b_1 - 1 / b_2}

    because :math:`\mathbb{E} |g_b|^2 = |G|^2 + \operatorname{tr} \Sigma / b`. Each estimate is unbiased, their ratio
    is not: average ``trace`` and ``signal`` over steps separately, then divide. The mean of ratios read 61 where the
    truth was 54 in one simulation.

    Args:
        small_norm_sq: Squared norm of the mean gradient over ``small_batch`` samples, or the mean of it over several
            such batches; any shape.
        big_norm_sq: Squared norm of the mean gradient over ``big_batch`` samples, same shape.
        small_batch: Number of samples :math:`b_1`.
        big_batch: Number of samples :math:`b_2`, larger.

    Returns:
        Three tensors of the shape of the norms; ``scale`` is NaN where ``signal`` is not positive.

    Raises:
        ValueError: If the sizes are numbers and not ``0 < small_batch < big_batch``.

    References:
        McCandlish et al., *An Empirical Model of Large-Batch Training*, 2018. https://arxiv.org/abs/1812.06162,
        appendix A.1.

    Example:
        >>> gradient_noise_scale(torch.tensor(1.5), torch.tensor(1.125), 2, 8)
        GradientNoise(trace=tensor(1.), signal=tensor(1.), scale=tensor(1.))
    """
    numbers = not (isinstance(small_batch, Tensor) or isinstance(big_batch, Tensor))
    if numbers and not 0 < small_batch < big_batch:
        raise ValueError(
            f"`small_batch` must be positive and smaller than `big_batch`, got {small_batch} and {big_batch}."
        )
    signal = (big_batch * big_norm_sq - small_batch * small_norm_sq) / (big_batch - small_batch)
    trace = (small_norm_sq - big_norm_sq) / (1 / small_batch - 1 / big_batch)
    return GradientNoise(trace, signal, noise_ratio(trace, signal))


def noise_ratio(trace: Tensor, signal: Tensor) -> Tensor:
    """``trace / signal``, NaN where ``signal`` is not positive."""
    return torch.where(signal > 0, trace / torch.where(signal > 0, signal, 1.0), torch.nan)


def gradient_coherence(sum_norm_sq: Tensor, norm_sq_sum: Tensor, count: int) -> Tensor:
    r"""How far the gradients of ``K`` micro-batches agree, from two norms.

    .. math:: \frac{|\sum_k g_k|^2 - \sum_k |g_k|^2}{(K - 1) \sum_k |g_k|^2}
        = \frac{\sum_{j \ne k} g_j \cdot g_k}{(K - 1) \sum_k |g_k|^2}

    Where the gradients have equal norms it is the mean cosine over pairs; otherwise long ones weigh more. The
    normalization is our choice: it needs no pair of gradients in memory at once.

    Args:
        sum_norm_sq: Squared norm of the sum of the gradients; any shape.
        norm_sq_sum: Sum of their squared norms, same shape.
        count: Number of gradients ``K``, at least 2.

    Returns:
        Same shape, between ``-1 / (K - 1)`` (they cancel) and 1 (all equal), about 0 where noise dominates; NaN if all
        are zero.

    Raises:
        ValueError: If ``count`` is less than 2.

    Example:
        >>> gradient_coherence(torch.tensor([16.0, 4.0, 0.0]), torch.tensor(4.0), 4)  # equal, orthogonal, cancelling
        tensor([ 1.0000,  0.0000, -0.3333])
    """
    if count < 2:
        raise ValueError(f"`count` must be at least 2: coherence is of several gradients, got {count}.")
    return (sum_norm_sq - norm_sq_sum) / ((count - 1) * norm_sq_sum)
