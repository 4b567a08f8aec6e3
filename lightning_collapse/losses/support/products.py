"""Log-determinants whose gradients, too, are in full precision and need no eigenvectors; products besides."""

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.product import product as product
from lightning_collapse.utilities.differentiable_once import differentiable_once


@full_precision
def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.mT``, as :func:`product`; both gradients lie in memory as the rows do.

    A gradient that lies otherwise is summed over rows in another order, and so rounded otherwise, according to which
    of several comes first.

    Args:
        left: Shape ``(..., n, k)``.
        right: Shape ``(..., m, k)``, with the same leading dimensions.

    Returns:
        Shape ``(..., n, m)``.
    """
    result: Tensor = _InnerProducts.apply(left, right)  # type: ignore[no-untyped-call]
    return result


def logdet(matrix: Tensor) -> Tensor:
    """Logarithm of the determinant of positive definite matrices, from their Cholesky factor; no wait for the device.

    Args:
        matrix: Symmetric, shape ``(..., D, D)``. One that is not positive definite reads ``nan``, instead of raising.

    Returns:
        Shape ``(...)``; it can be differentiated once.
    """
    result: Tensor = _LogDet.apply(matrix)  # type: ignore[no-untyped-call]
    return result


class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return product(grads[0], right), product(grads[0].mT, left)


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
