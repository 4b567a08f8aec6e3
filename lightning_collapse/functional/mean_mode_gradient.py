"""Mean-mode gradient: what part of the gradient of a residual writer comes from the mean tokens of its sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


class MeanModeGradient(NamedTuple):
    r"""Parts of the gradient :math:`G` of a weight; 0-dimensional.

    Attributes:
        mean: :math:`\|G_{mean}\|_F / \|G\|_F`, 0 or more; :math:`\sqrt{B / N}` of ``N`` independent tokens in ``B``
            sequences.
        centered: :math:`\|G_{ctr}\|_F / \|G\|_F`, 0 or more; norms of the parts need not add up.
        amplification: :math:`\|G\|_F^2 / \sum_t \|\delta_t\|^2 \|y_t\|^2`, from 0 to the number of tokens, where all
            of them pull the same way; 1 of independent ones.
    """

    mean: Tensor
    centered: Tensor
    amplification: Tensor


@full_precision
def mean_mode_gradient(inputs: Tensor, adjoints: Tensor, mask: Tensor | None = None) -> MeanModeGradient:
    r"""Split the gradient of a weight :math:`W` in :math:`y_t \mapsto W y_t` by the mean of each sequence.

    .. math:: G = \sum_b \sum_t \delta_t y_t^\top = \underbrace{\sum_b T_b \bar\delta_b \bar y_b^\top}_{G_{mean}} +
        \underbrace{\sum_b \sum_t (\delta_t - \bar\delta_b)(y_t - \bar y_b)^\top}_{G_{ctr}}

    When the mean part takes over, all tokens are moved alike: the loss of their differences (mean mode screaming).
    Clipping cannot help, since it scales both alike. Every number is free of the gradient's scale.

    Args:
        inputs: What the weight multiplied, :math:`y`, shape ``(B, T, I)``.
        adjoints: Gradient of the loss by what it returned, :math:`\delta`, shape ``(B, T, O)``.
        mask: Boolean, shape ``(B, T)``: tokens to count; all by default.

    Returns:
        Three readings, at least ``float32``; NaN where the gradient is zero.

    Raises:
        ValueError: If the first two dimensions differ.

    References:
        Lu, *Mean mode screaming*, 2026, https://arxiv.org/abs/2605.06169. There the amplification is of one sequence.

    Example:
        >>> y = torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]])
        >>> found = mean_mode_gradient(y, torch.ones(2, 2, 1))
        >>> found.mean, found.centered, found.amplification
        (tensor(1.), tensor(0.), tensor(1.))
    """
    if inputs.ndim != 3 or inputs.shape[:2] != adjoints.shape[:2]:
        shapes = tuple(inputs.shape), tuple(adjoints.shape)
        raise ValueError(f"`inputs` (B, T, I) and `adjoints` (B, T, O) must be of the same tokens, got {shapes}.")
    real = torch.ones_like(inputs[..., 0], dtype=torch.bool) if mask is None else mask.bool()
    inputs, adjoints = (torch.where(real.unsqueeze(-1), x, 0.0) for x in (inputs, adjoints))
    total = torch.einsum("bto,bti->oi", adjoints, inputs)
    means = inputs.sum(dim=1) / real.sum(dim=1).clamp_min(1).unsqueeze(-1)
    sums, energy = adjoints.sum(dim=1), (adjoints.square().sum(dim=-1) * inputs.square().sum(dim=-1)).sum()
    return mean_mode_parts(
        total.square().sum(), mean_mode_product(total, sums, means), mean_mode_square(sums, means), energy
    )


def mean_mode_product(total: Tensor, sums: Tensor, means: Tensor) -> Tensor:
    r"""Inner product of a gradient ``(O, I)`` with its mean part, of :math:`T \bar\delta` and :math:`\bar y`."""
    return ((sums @ total) * means).sum()


def mean_mode_square(sums: Tensor, means: Tensor) -> Tensor:
    r"""Squared norm of the mean part, from the Gram matrices of sequences: the matrix itself is never made."""
    return ((sums @ sums.mT) * (means @ means.mT)).sum()


def mean_mode_parts(total: Tensor, product: Tensor, mean: Tensor, energy: Tensor) -> MeanModeGradient:
    """The readings from the squared norm of the gradient, its product with the mean part, and that part's square."""
    centered = (total - 2 * product + mean).clamp_min(0)
    known = torch.where(total > 0, total, torch.nan)
    return MeanModeGradient((mean / known).clamp_min(0).sqrt(), (centered / known).sqrt(), known / energy)
