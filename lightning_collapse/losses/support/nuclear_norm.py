"""Nuclear norm: the sum of singular values, or of the largest, with a gradient that is finite everywhere."""

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.utilities.differentiable_once import differentiable_once


def nuclear_norm(matrix: Tensor, largest: int | None = None) -> Tensor:
    r"""Sum of singular values, and its subgradient :math:`U V^\top`: no gap is divided by.

    Where singular values vanish, the vectors that LAPACK completes the basis with make it a subgradient that still
    pulls rows apart.

    Args:
        matrix: Shape ``(N, D)``; ``nan`` is returned if not all is finite.
        largest: How many singular values, from the largest on; all by default.

    Returns:
        Scalar; it can be differentiated once.

    Example:
        >>> nuclear_norm(torch.diag(torch.tensor([3.0, 1.0]))), nuclear_norm(torch.diag(torch.tensor([3.0, 1.0])), 1)
        (tensor(4.), tensor(3.))
    """
    norm: Tensor = _NuclearNorm.apply(matrix, largest)  # type: ignore[no-untyped-call]
    return norm


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, largest: int | None) -> Tensor:
        finite = matrix.isfinite().all()
        # the solver raises on what is not finite; the loss and its gradient still tell of it
        u, singular_values, vh = torch.linalg.svd(torch.where(finite, matrix, 0.0), full_matrices=False)
        ctx.save_for_backward(torch.where(finite, u[:, :largest] @ vh[:largest], torch.nan))
        return torch.where(finite, singular_values[:largest].sum(), torch.nan)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grads[0], None
