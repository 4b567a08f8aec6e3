"""Centered kernel alignment (CKA), linear: whether two networks see the same inputs as alike in the same way."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def cka(x: Tensor, y: Tensor) -> Tensor:
    r"""Linear centered kernel alignment.

    .. math:: \lVert Y^\top X \rVert^2 / (\lVert X^\top X \rVert \lVert Y^\top Y \rVert)

    Near 1 of any features wider than there are rows, see :func:`cka_null`: :func:`debiased_cka` is not.

    Args:
        x: Rows ``(n, D)`` of one network.
        y: Rows ``(n, E)`` of another, on the same inputs.

    Returns:
        0-dimensional, 0 to 1; NaN for constant features.

    References:
        Kornblith et al., ICML 2019. https://arxiv.org/abs/1905.00414

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
        >>> round(cka(x, x.flip(1)).item(), 4)
        1.0
    """
    x, y = (of - of.mean(dim=0) for of in (x, y))
    own = torch.linalg.matrix_norm(x.mT @ x) * torch.linalg.matrix_norm(y.mT @ y)
    value: Tensor = (y.mT @ x).square().sum() / own
    return value


def cka_null(n: int, d: int) -> float:
    """Mean of :func:`cka` for independent isotropic features of one width ``d``; that of :func:`debiased_cka` is 0.

    Example:
        >>> round(cka_null(256, 512), 3)
        0.667
    """
    return d / (n + d)


@full_precision
def debiased_cka(x: Tensor, y: Tensor) -> Tensor:
    r"""Linear centered kernel alignment with unbiased independence criteria: 0 on average for independent features.

    .. math:: \mathrm{HSIC}_1(K, L) \Big/ \sqrt{\mathrm{HSIC}_1(K, K)\, \mathrm{HSIC}_1(L, L)}, \quad
        \mathrm{HSIC}_1 = \frac{1}{n(n-3)} \Big[\operatorname{tr} \tilde K \tilde L +
        \frac{1^\top \tilde K 1 \cdot 1^\top \tilde L 1}{(n-1)(n-2)} - \frac{2}{n-2} 1^\top \tilde K \tilde L 1\Big]

    where :math:`\tilde K` is :math:`X X^\top` with a zero diagonal.

    Args:
        x: Rows ``(n, D)`` of one network, four or more.
        y: Rows ``(n, E)`` of another, on the same inputs.

    Returns:
        0-dimensional, about 0 to 1; NaN where the denominator is not positive, as of constant features.

    References:
        Song et al., JMLR 13, 2012; Nguyen, Raghu & Kornblith, ICLR 2021. https://arxiv.org/abs/2010.15327

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
        >>> round(debiased_cka(x, 3 * x.flip(1) + 7).item(), 4), debiased_cka(x, torch.ones(5, 2)).item()
        (1.0, nan)
    """
    # the criterion does not know where the origin is, and its digits do
    k, l = (_hollow_gram(of - of.mean(dim=0)) for of in (x, y))  # noqa: E741
    own = _hsic(k, k).clamp_min(0) * _hsic(l, l).clamp_min(0)
    value: Tensor = torch.where(own > 0, _hsic(k, l) / own.sqrt(), torch.nan)
    return value


def _hollow_gram(rows: Tensor) -> Tensor:
    gram = rows @ rows.mT
    return gram - gram.diagonal().diag()


def _hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Without the factor that cancels."""
    n, (row_k, row_l) = len(k), (of.sum(dim=0) for of in (k, l))
    return (k * l).sum() + row_k.sum() * row_l.sum() / ((n - 1) * (n - 2)) - 2 * (row_k @ row_l) / (n - 2)
