"""Whitening without eigenvectors, and the distance of whitened views."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_collapse.losses.base import TooFewRowsError
from lightning_collapse.losses.support.rows import lengths, require_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.differentiable_once import differentiable_once
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad, world_size

Scope = Literal["rank", "global"]
SCOPES = get_args(Scope)
SHORTEST = 1e-4  # rows below this length, of about sqrt(D), are not normalized


def inverse_cholesky(covariance: Tensor) -> Tensor:
    r"""The inverse :math:`L^{-1}` of the Cholesky factor of :math:`C = L L^\top`: ``rows @ inverse.mT`` is white.

    Where :math:`C` is singular to working precision, a multiple of the identity, the root of that precision times the
    trace, is added first: the result stays finite, and rows that are zero stay zero. Nothing waits for the device.

    Args:
        covariance: Symmetric and positive semi-definite, shape ``(..., D, D)``.

    Returns:
        Lower triangular, shape ``(..., D, D)``; it can be differentiated once.

    Example:
        >>> inverse_cholesky(4 * torch.eye(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    inverse: Tensor = _InverseCholesky.apply(covariance)  # type: ignore[no-untyped-call]
    return inverse


def cosine_distances(first: Tensor, second: Tensor, shortest: float = SHORTEST) -> Tensor:
    """Squared distances of normalized rows, between 0 and 4: from two of ``(..., N, D)`` to ``(..., N)``."""
    first, second = (view / lengths(view).clamp_min(shortest).unsqueeze(-1) for view in (first, second))
    return 2 - 2 * (first * second).sum(dim=-1)


def shrunk(covariance: Tensor, eps: float) -> Tensor:
    """The covariance, ``(..., D, D)``, with a share ``eps`` of the identity."""
    if not eps:
        return covariance
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return (1 - eps) * covariance + eps * eye


def mean_over_processes(function: str, views: Tensor, total: Tensor, needed: int) -> Tensor:
    """Mean over the rows of those processes that have enough of them to whiten.

    Collective: every process must call it; one all-reduce of 3 numbers.

    Args:
        function: What to call the caller in messages.
        views: Shape ``(V, N, D)``.
        total: Sum over the rows of this process; 0 if it has fewer than ``needed``.
        needed: The fewest rows that a process whitens.

    Raises:
        TooFewRowsError: If no process has that many.
    """
    rows = views.shape[1]
    if world_size() == 1:
        require_rows(function, needed, rows, rows)
        return total / rows
    # depends on the views even if it is zero, so that this process takes part in the backward pass
    total = total + 0 * views[:, :0].sum()
    counts = total.new_tensor(rows if rows >= needed else 0), total.new_tensor(rows)
    message = all_reduce_sum_with_grad(torch.stack([*counts, total]))
    if rows < needed and not int(message[0]):
        purpose = f"s on one process to whiten {needed - 1} features" if needed > 1 else ""
        raise TooFewRowsError(
            f"`{function}` needs at least {needed} row{purpose}, got {int(message[1])} over all processes"
            f" ({rows} here). Use larger batches, or `scope='global'`."
        )
    mean: Tensor = message[2] / message[0].detach()
    return mean


class _InverseCholesky(torch.autograd.Function):
    r""":math:`dW = -\Phi(W\, dC\, W^\top)\, W`, :math:`\Phi` being the lower triangle with half the diagonal."""

    @staticmethod
    def forward(ctx: Any, covariance: Tensor) -> Tensor:
        dim = covariance.shape[-1]
        eye = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
        precision = torch.finfo(covariance.dtype).eps
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(dim=-1)
        singular = (failed > 0) | (pivots <= dim * precision * diagonal.amax(dim=-1))
        ridge = torch.where(singular, precision**0.5 * diagonal.sum(dim=-1) + 1e-6, 0.0)
        factor, _ = torch.linalg.cholesky_ex(covariance + ridge[..., None, None] * eye)
        inverse: Tensor = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _gradient(grads[0], *ctx.saved_tensors)


@full_precision  # the backward pass may run under autocast
def _gradient(grad: Tensor, inverse: Tensor) -> Tensor:
    inner = (grad @ inverse.mT).tril()
    inner = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1) / 2)
    outer: Tensor = inverse.mT @ inner @ inverse
    return -(outer + outer.mT) / 2
