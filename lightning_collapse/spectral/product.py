"""Matrix products whose gradients, too, are in full precision."""

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, with autocast off in the forward *and* in the backward pass.

    A loss is often differentiated where autocast is on, and autograd's own backward pass of a product then runs in
    half precision, whatever the forward pass did.

    Args:
        left: Shape ``(..., n, k)``.
        right: Shape ``(..., k, m)``, with the same leading dimensions.

    Returns:
        Shape ``(..., n, m)``.

    Example:
        >>> product(torch.eye(2), torch.ones(2, 1)).squeeze()
        tensor([1., 1.])
    """
    if right is left:  # Dynamo does not trace a function of the same tensor twice
        right = right.clone()
    result: Tensor = _Product.apply(left, right)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return product(grads[0], right.mT), product(left.mT, grads[0])
