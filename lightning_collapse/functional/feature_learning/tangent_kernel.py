"""Neural tangent kernel of one layer: inner products of the gradients of single samples, without any of them whole."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_whole


@torch.no_grad()
@full_precision
def tangent_kernel(gradients: Tensor, inputs: Tensor) -> Tensor:
    r"""Gram matrix of the gradients that single samples give the weight of a linear layer, exactly.

    The gradient of sample :math:`i` is a sum of outer products :math:`\sum_s g_{is} a_{is}^\top` over the positions at
    which the layer is applied, so that

    .. math:: K_{ij} = \sum_{s, t} (g_{is} \cdot g_{jt}) (a_{is} \cdot a_{jt})

    Without shared weights that is the product of two Gram matrices, :math:`O(b^2 (o + i))`; with them pairs of
    positions or whole gradients are taken, whichever costs less.

    Args:
        gradients: Of a scalar of each sample with respect to the layer's outputs, shape ``(b, o)`` or ``(b, T, o)``.
        inputs: Of the layer, shape ``(b, i)`` or ``(b, T, i)``.

    Returns:
        Shape ``(b, b)``.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> tangent_kernel(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([[1., 2.],
                [2., 8.]])
    """
    g, a = _positions(gradients, inputs)
    samples, length, wide = len(g), g.shape[1], g.shape[2] + a.shape[2]
    whole = g.shape[2] * a.shape[2]
    if samples * length * length * wide <= (length + samples) * whole or length == 1:
        pairs = (g.flatten(0, 1) @ g.flatten(0, 1).T) * (a.flatten(0, 1) @ a.flatten(0, 1).T)
        return pairs.view(samples, length, samples, length).sum(dim=(1, 3))
    rows = (g.mT @ a).flatten(1)
    return rows @ rows.T


@torch.no_grad()
@full_precision
def projected_tangent_kernel(gradients: Tensor, inputs: Tensor, size: int = 256, seed: int = 0) -> Tensor:
    r""":func:`tangent_kernel` of random projections: as many numbers per sample as ``size``, whatever the layer.

    .. math:: \phi_i = \frac{1}{\sqrt m} \sum_s (R_1 g_{is}) \odot (R_2 a_{is}), \quad
        \mathbb E\, \phi_i \cdot \phi_j = K_{ij}

    with Gaussian :math:`R_1, R_2`. Compare kernels of one ``seed`` only, and off their diagonals: the noise of two
    projections has nothing in common, and that of one inflates the diagonal.

    Args:
        gradients: As of :func:`tangent_kernel`.
        inputs: As of :func:`tangent_kernel`.
        size: Rows ``m`` of both projections.
        seed: Of the projections; no global random number is drawn.

    Returns:
        Shape ``(b, b)``.

    Raises:
        ValueError: If the shapes do not fit, or ``size`` is no positive integer.

    Example:
        >>> g, a = torch.ones(3, 5, 4), torch.ones(3, 5, 2)
        >>> bool((projected_tangent_kernel(g, a, 4096) / tangent_kernel(g, a) - 1).abs().max() < 0.2)
        True
    """
    require_whole(1, size=size)
    g, a = _positions(gradients, inputs)
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(x.shape[-1], size, generator=generator).to(x) for x in (g, a))
    rows = torch.einsum("btm,btm->bm", g @ left, a @ right)
    return rows @ rows.T / size


def _positions(gradients: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    if gradients.ndim not in (2, 3) or gradients.shape[:-1] != inputs.shape[:-1]:
        raise ValueError(
            "`gradients` and `inputs` must have shapes (b, o) and (b, i), or (b, T, o) and (b, T, i), got"
            f" {tuple(gradients.shape)} and {tuple(inputs.shape)}."
        )
    return (gradients, inputs) if gradients.ndim == 3 else (gradients.unsqueeze(1), inputs.unsqueeze(1))
