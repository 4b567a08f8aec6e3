"""Nearest Kronecker product: a sum of two of them, as one."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype

ITERATIONS = 100


@torch.no_grad()
def nearest_kronecker_product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    r"""The product :math:`A \otimes G` that is nearest to :math:`A_1 \otimes G_1 + A_2 \otimes G_2` in Frobenius norm.

    Its factors are weighted sums, :math:`A = \sum_i x_i A_i` and :math:`G \propto \sum_i y_i G_i`: with the Gram
    matrices :math:`K_A = [\langle A_i, A_j \rangle]` and :math:`K_G`, :math:`x` is the leading eigenvector of
    :math:`K_G K_A` and :math:`y = K_A x`. Inner products of positive semidefinite matrices are not negative, hence
    neither are :math:`x` and :math:`y`, and the result is positive semidefinite too.

    Args:
        first: :math:`A_1`, ``(I, I)``, and :math:`G_1`, ``(O, O)``.
        second: Of the same shapes.

    Returns:
        :math:`A` and :math:`G`.

    References:
        Van Loan & Pitsianis, *Approximation with Kronecker products*, 1993.

    Example:
        >>> one = torch.eye(1)
        >>> torch.kron(*nearest_kronecker_product((one, one), (one, 2 * one))).round(decimals=4)
        tensor([[3.]])
    """
    (a1, g1), (a2, g2) = first, second
    inputs, gradients = _gram(a1, a2), _gram(g1, g2)
    x = torch.ones(2, dtype=torch.float64)
    for _ in range(ITERATIONS):
        x = gradients @ (inputs @ x)
        x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    y = inputs @ x
    y = y / (x @ y).clamp_min(torch.finfo(x.dtype).tiny)
    (x1, x2), (y1, y2) = x.tolist(), y.tolist()
    return x1 * a1 + x2 * a2, y1 * g1 + y2 * g2


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Inner products, in double precision on the host."""
    kind = accumulation_dtype(a.device)
    a, b = a.to(kind), b.to(kind)
    aa, ab, bb = torch.stack([(a * a).sum(), (a * b).sum(), (b * b).sum()]).tolist()
    return torch.tensor([[aa, ab], [ab, bb]], dtype=torch.float64)
