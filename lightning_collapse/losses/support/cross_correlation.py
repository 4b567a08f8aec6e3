"""Cross-correlation of the features of two views: how far from the identity, on the diagonal and off it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.losses.support.statistics import center
from lightning_collapse.utilities.differentiable_once import differentiable_once
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size


def correlation_terms(
    function: str, views: Sequence[Tensor], eps: float, lost: int = 0, mean_over_rows: bool = False
) -> dict[str, Tensor]:
    r"""The two sums of squares that Barlow Twins is made of.

    .. math:: \sum_i (1 - C_{ii})^2, \qquad \sum_{i \ne j} C_{ij}^2, \qquad
        C_{ij} = f\, s_i s'_j \sum_n x_{ni} x'_{nj}, \quad s_i = \Big(\sum_n x_{ni}^2 + m \epsilon\Big)^{-1/2}

    with rows :math:`x` about the mean of the global batch. Can be differentiated once.

    Collective: every process must call it; two all-reduces, of ``2 D + 2`` and of ``D * D + 2 D`` numbers, and one of
    two numbers in the backward pass.

    Args:
        function: What to call the caller in messages.
        views: Representations of two views of the same samples in the same order, each of shape ``(N, D)``.
        eps: Added to variances.
        lost: Degrees of freedom that variances lose, :math:`m = N - \text{lost}`.
        mean_over_rows: Whether products are averaged over :math:`N` nevertheless: :math:`f` is :math:`m / N`, or 1.

    Returns:
        Scalars ``invariance`` and ``redundancy``.

    Raises:
        TooFewRowsError: If there are fewer than two rows over all processes.
    """
    rows, samples, _ = center(function, views)
    terms = _Terms.apply(rows, samples, samples - lost, eps, mean_over_rows)  # type: ignore[no-untyped-call]
    return dict(zip(("invariance", "redundancy"), terms, strict=True))


class _Terms(torch.autograd.Function):
    r"""Gradients without a sum over rows.

    Where that of the correlation is :math:`G`, that of the rows of the first view is :math:`f X' S' G^\top S` less what
    its deviations change, :math:`X S^2 \operatorname{diag}(C G^\top)`.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, samples: int | Tensor, dof: int | Tensor, eps: float, mean_over_rows: bool
    ) -> tuple[Tensor, Tensor]:
        products, energies = rows[0].mT @ rows[1], rows.square().sum(dim=1)
        if world_size() > 1:
            message = all_reduce_sum(torch.cat([products, energies]))
            products, energies = message[:-2], message[-2:]
        scale = (energies + eps * dof).rsqrt()
        outer = torch.outer(*scale)
        if mean_over_rows:
            outer = outer * (dof / samples)
        correlation = products.mul_(outer)
        error = correlation.diagonal() - 1
        correlation.diagonal().zero_()
        squares = correlation.square()
        sums = torch.stack([squares.sum(dim=1), squares.sum(dim=0)])
        ctx.save_for_backward(rows, scale, outer, correlation, error, sums)
        return error.square().sum(), sums[0].sum()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, outer, correlation, error, sums = ctx.saved_tensors
        if world_size() > 1:
            grads = tuple(all_reduce_sum(torch.stack(grads)))
        on, off = 2 * grads[0] * error, 2 * grads[1]
        gradient = rows * (scale.square() * (off * sums).addcmul_(on, 1 + error)).neg_().unsqueeze(1)
        inner = (correlation * off).mul_(outer)
        inner.diagonal().copy_(on * outer.diagonal())
        # in place: autocast, which may be on in the backward pass, lets such products be
        gradient[0].addmm_(rows[1], inner.mT)
        gradient[1].addmm_(rows[0], inner)
        return gradient, None, None, None, None
