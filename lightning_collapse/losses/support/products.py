"""Log-determinants whose gradients, too, are in full precision and need no eigenvectors; products besides."""

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.product import product as product
from lightning_collapse.utilities.differentiable_once import differentiable_once


def logdet(matrix: Tensor) -> Tensor:
    """Logarithm of the determinant of positive definite matrices, from their Cholesky factor; no wait for the device.

    Args:
        matrix: Symmetric, shape ``(..., D, D)``. One that is not positive definite reads ``nan``, instead of raising.

    Returns:
        Shape ``(...)``; it can be differentiated once.
    """
    result: Tensor = _LogDet.apply(matrix)  # type: ignore[no-untyped-call]
    return result


class _LogDet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(matrix)
        ctx.save_for_backward(factor)
        value = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        return torch.where(info == 0, value, torch.nan)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _inverse(ctx.saved_tensors[0]) * grads[0][..., None, None]


@full_precision
def _inverse(factor: Tensor) -> Tensor:
    return torch.cholesky_inverse(factor)
