"""Spectral alignment: whether the inputs of a weight lean to one side of its top singular vector."""

from __future__ import annotations

from math import exp, lgamma, log, nan

import torch
from torch import Tensor

from lightning_collapse.spectral.power_iteration import top_singular_pair
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows


def spectral_alignment(inputs: Tensor, weight: Tensor, center: bool = False) -> Tensor:
    r"""Cosine between each input of a weight matrix and the matrix's top right singular vector.

    .. math:: \operatorname{SA}(x) = \frac{\langle x, v_1 \rangle}{\|x\|}, \quad
        v_1 = \operatorname{arg\,max}_{\|v\| = 1} \|W v\|

    In healthy training the signs are balanced; inputs that all come to lie on one side precede loss explosions [1].
    The sign of :math:`\langle x, v_1\rangle` is that of :math:`\langle W x, u_1\rangle`: it does not matter on which
    side of the matrix one looks.

    Args:
        inputs: What the matrix multiplies, shape ``(N, I)``.
        weight: Shape ``(O, I)``, as in ``nn.Linear.weight``: ``y = W x``.
        center: Of the inputs less their mean; inputs with a large mean (after ReLU, say) are one-sided without any
            pathology. Not part of [1].

    Returns:
        Cosines, shape ``(N,)``, from -1 to 1, at least ``float32``; exactly 0 where they are 0 up to rounding and for a
        row of zeros, NaN for rows with NaN or infinity and for a matrix that has no top singular vector. The sign of
        all of them together is a convention: the largest component of the singular vector is positive.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        [1] Qiu et al., *Spectral Alignment as predictor of loss explosion in neural network training*, 2025.
        https://arxiv.org/abs/2510.04202

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> spectral_alignment(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), weight)
        tensor([ 1., -1.,  0.])
    """
    if inputs.ndim != 2 or weight.ndim != 2 or inputs.shape[1] != weight.shape[1]:
        raise ValueError(
            f"`inputs` must have shape (N, I) and `weight` (O, I), got {tuple(inputs.shape)} and"
            f" {tuple(weight.shape)}. Flatten all but the last dimension of the inputs."
        )
    pair = top_singular_pair(weight)
    direction = torch.where(pair.residual.isfinite(), pair.direction, nan)
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    return _alignment(inputs.to(accumulation_dtype(inputs.device)), direction.to(inputs.device), center, dtype)


@full_precision
def cosines(projections: Tensor, norms: Tensor) -> Tensor:
    """Projections on a unit vector over norms, ``(...)``; exactly 0 where that is rounding, NaN if not finite."""
    values = projections / norms.clamp_min(torch.finfo(norms.dtype).tiny)  # a row of zeros is on neither side
    values = torch.where(values.abs() <= 8 * torch.finfo(values.dtype).eps, 0.0, values)
    return torch.where(norms.isfinite(), values, nan)


def sign_counts(alignment: Tensor) -> tuple[Tensor, Tensor]:
    """How many are positive and how many negative, over the last dimension."""
    return (alignment > 0).sum(dim=-1), (alignment < 0).sum(dim=-1)


def diversity_of_counts(positive: Tensor, negative: Tensor) -> Tensor:
    """:func:`sign_diversity` from the counts of both signs; NaN where there are none."""
    return 2 * torch.minimum(positive, negative) / (positive + negative)


def sign_diversity(alignment: Tensor) -> Tensor:
    r"""How evenly alignments fall on both sides of zero.

    .. math:: D = 1 - |2 p_+ - 1| = 2 \min(p_+, 1 - p_+), \quad p_+ = \frac{\#\{a > 0\}}{\#\{a \ne 0\}}

    The scalar is ours: [1] speaks of the collapse of the sign diversity of a distribution.

    Args:
        alignment: Shape ``(..., N)``; zeros and NaN do not count.

    Returns:
        Shape ``(...)``, from 0 (all on one side) to 1 (balanced); NaN if nothing counts. Of ``n`` fair signs it is
        ``2 - 2 * expected_majority_fraction(n)`` on average, a little less than 1.

    References:
        [1] Qiu et al., 2025. https://arxiv.org/abs/2510.04202

    Example:
        >>> sign_diversity(torch.tensor([[0.3, -0.1, 0.2, -0.4], [0.3, 0.1, 0.2, 0.0]]))
        tensor([1., 0.])
    """
    return diversity_of_counts(*sign_counts(alignment))


def majority_fraction(alignment: Tensor) -> Tensor:
    """Share of the more frequent sign, ``1 - sign_diversity / 2``.

    Args:
        alignment: Shape ``(..., N)``; zeros and NaN do not count.

    Returns:
        Shape ``(...)``, from 1/2 (balanced) to 1 (all on one side); NaN if nothing counts.

    Example:
        >>> majority_fraction(torch.tensor([0.3, -0.1, 0.2, 0.4]))
        tensor(0.7500)
    """
    return 1 - sign_diversity(alignment) / 2


def expected_majority_fraction(n: int) -> float:
    r"""What :func:`majority_fraction` reads on average for ``n`` independent fair signs.

    .. math:: E[M] = \tfrac12 + \frac{\nu}{n}\binom{n}{\nu} 2^{-n} \approx \tfrac12 + \frac{1}{\sqrt{2 \pi n}},
        \quad \nu = \lfloor n / 2 \rfloor + 1

    This is de Moivre's mean absolute deviation of the binomial distribution. Tokens of one sequence are correlated:
    count them as fewer.

    Args:
        n: Number of signs, at least 1.

    Returns:
        Between 1/2 and 1.

    Raises:
        ValueError: If ``n`` is not positive.

    Example:
        >>> expected_majority_fraction(1), round(expected_majority_fraction(256), 3)
        (1.0, 0.525)
    """
    if n < 1:
        raise ValueError(f"`n` is a number of signs and must be at least 1, got {n}.")
    k = n // 2 + 1
    return 0.5 + k / n * exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2))


@full_precision
def mean_energy_share(inputs: Tensor) -> Tensor:
    r"""Share of the inputs' energy that is in their mean.

    .. math:: \frac{\|E\,x\|^2}{E\,\|x\|^2}

    Where it is near 1 all inputs point the same way, and one-sided signs say nothing more than that. Our companion to
    the sign diversity, not part of arXiv:2510.04202.

    Args:
        inputs: Shape ``(N, I)``; rows with NaN or infinity do not count.

    Returns:
        Scalar from 0 to 1 (all rows equal), at least ``float32``; about ``1 / N`` for inputs without a mean, NaN if
        there is nothing but zeros.

    Example:
        >>> mean_energy_share(torch.tensor([[3.0, 1.0], [3.0, -1.0]]))
        tensor(0.9000)
    """
    rows, _, counts = finite_rows(inputs)
    wide = rows.to(accumulation_dtype(rows.device))
    return (wide.sum(dim=0).square().sum() / (counts.sum() * wide.square().sum())).to(rows.dtype)


@full_precision
def _alignment(inputs: Tensor, direction: Tensor, center: bool, dtype: torch.dtype) -> Tensor:
    if center:
        rows, _, counts = finite_rows(inputs)
        inputs = inputs - rows.sum(dim=0) / counts.sum()
    # to the dtype of the inputs first: what is rounding there is zero
    return cosines((inputs @ direction).to(dtype), torch.linalg.vector_norm(inputs, dim=1).to(dtype))
