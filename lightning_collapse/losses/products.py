"""Matrix functions whose backward pass leaves autocast, too, and needs no eigenvectors."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_collapse.spectral.precision import full_precision


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices in their own precision, gradients included.

    ``full_precision`` covers the forward pass. If the backward pass runs under autocast, that of a plain ``@`` is
    rounded to half precision.

    Args:
        a: Shape ``(..., N, K)``.
        b: Shape ``(..., K, M)``, with the same leading dimensions.
    """
    result: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
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


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        wanted_a, wanted_b = ctx.needs_input_grad
        return (
            _leave(grads[0], b.mT) if wanted_a else None,
            _leave(a.mT, grads[0]) if wanted_b else None,
        )


_leave = full_precision(product)


class _LogDet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(matrix)
        ctx.save_for_backward(factor)
        value = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        return torch.where(info == 0, value, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _inverse(ctx.saved_tensors[0]) * grads[0][..., None, None]


@full_precision
def _inverse(factor: Tensor) -> Tensor:
    return torch.cholesky_inverse(factor)
