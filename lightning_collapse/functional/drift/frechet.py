r"""Frechet distance of two Gaussians with the means and covariances of two samples."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared Frechet distance of two samples taken for normal.

    .. math:: \lVert \mu_1 - \mu_2 \rVert^2 +
        \operatorname{tr}\big(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2}\big)

    Far from unbiased: compare with :func:`frechet_null`. The cost is that of two decompositions ``(D, D)``.

    Args:
        x: Rows ``(n, D)``, two or more.
        y: Rows ``(m, D)``, two or more.

    Returns:
        0-dimensional, 0 to infinity; :math:`\lVert \delta \rVert^2 + D (\sigma_1 - \sigma_2)^2` of isotropic laws.

    References:
        Dowson & Landau, *The Frechet distance between multivariate normal distributions*, 1982; Heusel et al., NIPS
        2017, https://arxiv.org/abs/1706.08500

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> round(frechet_distance(x, 3 * x + 5).item(), 4)  # 25 + 2 (3 - 1) ** 2
        33.0
    """
    first, second = (torch.cov(of.mT).reshape(of.shape[1], of.shape[1]) for of in (x, y))
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    shift = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    value: Tensor = shift + (first.trace() + second.trace() - 2 * cross).clamp_min(0)
    return value


def frechet_null(n: int, m: int, d: int) -> float:
    r"""Mean of :func:`frechet_distance` for two samples of :math:`\mathcal N(0, I)`, to first order in the rows.

    .. math:: \Big(d + \frac{d (d + 1)}{4}\Big) \Big(\frac1n + \frac1m\Big)

    Example:
        >>> round(frechet_null(1000, 1000, 64), 2)
        2.21
    """
    return (d + d * (d + 1) / 4) * (1 / n + 1 / m)
