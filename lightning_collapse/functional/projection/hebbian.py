"""Oja's rule: principal directions of inputs by Hebbian learning, without a decomposition of their moment."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision


@full_precision
def oja_step(directions: Tensor, second_moment: Tensor, lr: float = 0.01) -> Tensor:
    r"""One step of Oja's subspace rule, :math:`V \leftarrow V + \eta\, \frac1B \sum y (x - V^\top y)^\top`, [1] in [2].

    With :math:`y = V x` the sum is :math:`V C (I - V^\top V)` with :math:`C = \frac1B \sum x x^\top`: inputs are needed
    by their second moment alone.

    Args:
        directions: :math:`V`, rows ``(K, D)``.
        second_moment: :math:`C`, ``(D, D)``.
        lr: :math:`\eta`, below 1 over the largest eigenvalue of :math:`C`; published is 0.01. Entries of what it
            multiplies are clamped at 10, as published.

    Returns:
        Shape ``(K, D)``.

    References:
        [1] Oja, *Neural networks, principal components, and subspaces*, 1989.
        [2] Xiao et al., *Hebbian Learning based Orthogonal Projection for Continual Learning of Spiking Neural
        Networks*, ICLR 2024. https://arxiv.org/abs/2402.11984

    Example:
        >>> oja_step(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]]), lr=0.1)
        tensor([[1.0000, 0.0500]])
    """
    response = directions @ second_moment
    return directions + lr * (response - response @ directions.T @ directions).clamp(-10, 10)


@torch.no_grad()
@full_precision
def oja_directions(second_moment: Tensor, number: int, lr: float = 0.5, steps: int = 2000) -> Tensor:
    """A basis of the principal directions of inputs, by :func:`oja_step` from a fixed random start.

    The moment is scaled so that its largest eigenvalue is at most 1. The error shrinks by about ``1 - lr * gap`` a
    step, with the gap between the last eigenvalue that is kept and the next one, relative to that scale.

    Args:
        second_moment: Shape ``(D, D)``.
        number: How many, at most ``D``.
        lr: Step, at most 1.
        steps: How many at most; fewer if nothing moves any more.

    Returns:
        Columns ``(D, number)``, nearly orthonormal; none if the moment is zero or not finite.

    Example:
        >>> oja_directions(torch.diag(torch.tensor([4.0, 1.0, 0.1])), 1).abs().round(decimals=3).T
        tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    moment = second_moment.to(accumulation_dtype(second_moment.device))
    scale = torch.linalg.matrix_norm(moment, 1)
    if not 0 < scale < torch.inf or not number:
        return moment[:, :0]
    moment = moment / scale
    generator = torch.Generator().manual_seed(len(moment))
    start = torch.randn(len(moment), number, generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(start)[0].T.to(moment)  # on the host, where there is a decomposition
    for step in range(steps):
        before, rows = rows, oja_step(rows, moment, lr)
        if step % 50 == 49 and (rows - before).abs().max() < 1e-10:
            break
    return rows.T
