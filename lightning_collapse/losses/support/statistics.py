"""Batch statistics over all processes: centered rows, variances, and the covariance energy on the cheaper side."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.rows import require_rows
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.differentiable_once import differentiable_once
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad, world_size


class CenteredBatch(NamedTuple):
    """Views without the mean of the global batch.

    Attributes:
        rows: Rows of this process minus the global mean, shape ``(V, N, D)``.
        samples: Number of rows over all processes: a number, or a 0-dimensional tensor if there are several processes.
        extra: Sum over all processes of a scalar that came along.
    """

    rows: Tensor
    samples: int | Tensor
    extra: Tensor


def require_matrices(function: str, **views: Tensor) -> tuple[Tensor, ...]:
    """Check feature matrices, each of shape ``(N, D)``, and return them as they are.

    Args:
        function: What to call the caller in messages.
        views: Feature matrices by argument name.

    Raises:
        ValueError: If one is not a matrix of floating-point numbers, or if their shapes differ.
    """
    for name, view in views.items():
        if view.ndim != 2 or not view.is_floating_point():
            raise ValueError(
                f"`{name}` of `{function}` must be floating point of shape (N, D), got {view.dtype} of shape"
                f" {tuple(view.shape)}. Flatten tokens to rows or pool maps first."
            )
    shapes = {name: tuple(view.shape) for name, view in views.items()}
    if len(set(shapes.values())) > 1:
        found = " and ".join(f"`{name}` {shape}" for name, shape in shapes.items())
        raise ValueError(f"The views of `{function}` must have one shape, got {found}. Row i of both is one sample.")
    return tuple(views.values())


def separate_views(function: str, **views: Tensor) -> tuple[Tensor, ...]:
    """Check feature matrices as :func:`require_matrices` does; each gets one gradient, however often a loss uses it.

    In which order several would be added to those of other losses is not decided by a loss.
    """
    return tuple(view.view_as(view) for view in require_matrices(function, **views))


def stack_views(function: str, **views: Tensor) -> Tensor:
    """Check feature matrices as :func:`require_matrices` does, and stack them to ``(V, N, D)``."""
    return torch.stack(require_matrices(function, **views))


def center(
    function: str, views: Sequence[Tensor], extra: Tensor | None = None, rows: int = 2, grad_of_mean: bool = False
) -> CenteredBatch:
    """Subtract the mean of the global batch; nothing is left of equal rows, see :func:`without_mean`.

    Collective: every process must call it; one all-reduce of ``V * D + 2`` numbers. Only a process with fewer than
    ``rows`` rows waits for the count, to raise where, and only where, all others raise too.

    Args:
        function: What to call the caller in messages.
        views: Each of shape ``(N, D)``; ``N`` may differ between processes.
        extra: A scalar of this process to sum over all of them in the same message; keeps its gradient.
        rows: The fewest rows, over all processes, that will do.
        grad_of_mean: Whether the mean passes a first derivative on, as it does a second one: not needed where nothing
            but products of centered rows is summed, since it would be multiplied by their sum, which is zero.

    Raises:
        TooFewRowsError: If there are fewer than ``rows`` rows over all processes.
    """
    n = len(views[0])
    extra = views[0].new_zeros(()) if extra is None else extra
    if world_size() == 1:
        require_rows(function, rows, n, n)
        centered: Tensor = _Centered.apply(grad_of_mean, n, None, *views)  # type: ignore[no-untyped-call]
        return CenteredBatch(centered, n, extra)
    sums = _sums(torch.stack([view.detach() for view in views]), 1)
    message = all_reduce_sum_with_grad(torch.cat([sums.new_full((1,), n), extra.reshape(1).to(sums), sums.flatten()]))
    count, extra = message[0].detach().to(views[0]), message[1].to(extra)
    require_rows(function, rows, count, n)
    mean = (message[2:].detach().view_as(sums) / count).to(views[0].dtype)
    centered = _Centered.apply(grad_of_mean, count, mean, *views)  # type: ignore[no-untyped-call]
    return CenteredBatch(centered, count, extra)


class _Centered(torch.autograd.Function):
    """Views, stacked, about a mean, their own if none is given, which passes on what is not multiplied by zero.

    Without ``grad_of_mean`` those are second derivatives; a first one with ``create_graph=True`` tells that they come.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_of_mean: bool, count: int | Tensor, mean: Tensor | None, *views: Tensor) -> Tensor:
        rows = torch.stack(views)
        return _subtract_mean(rows, 1) if mean is None else rows.sub_(mean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.grad_of_mean, ctx.count, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.grad_of_mean = ctx.grad_of_mean or torch.is_grad_enabled()
        (gradient,) = grads
        if ctx.grad_of_mean:
            gradient = gradient - all_reduce_sum_with_grad(gradient.sum(dim=1, keepdim=True)) / ctx.count
        return None, None, None, *gradient.unbind()


def without_mean(rows: Tensor, dim: int) -> Tensor:
    """Subtract the mean over a dimension; nothing is left of equal rows, whatever their size.

    A mean in the precision of the rows is rounded, and what is left of equal rows is then equal too, and not zero: a
    loss that does not see the scale of its input would take it for features.

    Example:
        >>> without_mean(torch.full((6, 1), 50.1), dim=0).any()
        tensor(False)
    """
    return _subtract_mean(rows.clone(), dim)


def _subtract_mean(rows: Tensor, dim: int) -> Tensor:
    """The same in place, by way of the first row."""
    rows = rows.sub_(_first(rows, dim))
    return rows.sub_(rows.mean(dim=dim, keepdim=True))


def _sums(rows: Tensor, dim: int) -> Tensor:
    """Sums over a dimension, which stays; of equal numbers exact, in ``float64`` if the device has it."""
    wide, first = accumulation_dtype(rows.device), _first(rows, dim)
    # the sums over many rows themselves need no more than the precision of the rows
    return (rows - first).sum(dim=dim, keepdim=True).to(wide) + rows.shape[dim] * first.to(wide)


def _first(rows: Tensor, dim: int) -> Tensor:
    """The first row, without gradient; zeros if there is none."""
    return rows.detach().narrow(dim, 0, min(rows.shape[dim], 1)).sum(dim=dim, keepdim=True)


def variances(batch: CenteredBatch) -> Tensor:
    """Unbiased variance of every feature of the global batch, ``(V, D)``.

    Collective: every process must call it; one all-reduce of ``V * D`` numbers.
    """
    return all_reduce_sum_with_grad(batch.rows.square().sum(dim=1)) / (batch.samples - 1)


def covariances(batch: CenteredBatch) -> Tensor:
    """Unbiased covariance of the features of the global batch, ``(V, D, D)``; of rows ``(N, D)`` it is ``(D, D)``.

    Collective: every process must call it; one all-reduce of ``V * D * D`` numbers.
    """
    return all_reduce_sum_with_grad(product(batch.rows.mT, batch.rows)) / (batch.samples - 1)


def variances_and_covariance(batch: CenteredBatch) -> tuple[Tensor, Tensor]:
    r"""Variances ``(V, D)`` and covariance energies ``(V,)`` of the global batch.

    The energy is :math:`\sum_{i \ne j} C_{ij}^2` with the unbiased covariance :math:`C`. In one process it is computed
    from the smaller of the ``N x N`` and the ``D x D`` matrix; several processes share the ``D x D`` one.

    Collective: every process must call it; one all-reduce of ``V * D * D`` numbers.
    """
    if world_size() == 1:
        energy: Tensor = _OffDiagonalEnergy.apply(batch.rows, batch.samples - 1)  # type: ignore[no-untyped-call]
        return variances(batch), energy
    covariance = covariances(batch)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    return diagonal, (covariance - torch.diag_embed(diagonal)).square().sum(dim=(-2, -1))


class _OffDiagonalEnergy(torch.autograd.Function):
    r"""Sum of squares off the diagonal of ``X.mT @ X / dof``, and its gradient, from the smaller side.

    With :math:`K = X X^\top / m`, :math:`C = X^\top X / m` and :math:`v = \operatorname{diag} C`:
    :math:`\|K\|_F = \|C\|_F`, so the energy is :math:`\|K\|_F^2 - \|v\|^2` and its gradient
    :math:`\frac{4}{m} (K X - X \operatorname{diag} v)`: no ``D x D`` matrix anywhere. The difference cancels when
    nearly nothing is off the diagonal, which cannot be while ``N < D``; with ``N >= D`` the diagonal is taken out of
    :math:`C` itself.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dof: int) -> Tensor:
        ctx.dof = dof
        if rows.shape[-2] < rows.shape[-1]:
            gram = (rows @ rows.mT).div_(dof)
            variance = rows.square().sum(dim=-2, keepdim=True).div_(dof)
            ctx.save_for_backward(rows, gram, variance)
            return gram.square().sum(dim=(-2, -1)) - variance.square().sum(dim=(-2, -1))
        covariance = (rows.mT @ rows).div_(dof)
        covariance.diagonal(dim1=-2, dim2=-1).zero_()
        ctx.save_for_backward(rows, covariance)
        return covariance.square().sum(dim=(-2, -1))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gradient(grads[0] * (4 / ctx.dof), *ctx.saved_tensors), None


@full_precision  # the backward pass may run under autocast
def _gradient(scale: Tensor, rows: Tensor, matrix: Tensor, variance: Tensor | None = None) -> Tensor:
    if variance is None:
        return (rows @ matrix).mul_(scale.view(-1, 1, 1))
    return torch.baddbmm(rows * variance, matrix, rows, beta=-1).mul_(scale.view(-1, 1, 1))
