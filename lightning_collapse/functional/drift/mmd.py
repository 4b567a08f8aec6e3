r"""Maximum mean discrepancy (MMD) of two samples under a Gaussian kernel: exact, or by random Fourier features."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision


@full_precision
def mmd2(x: Tensor, y: Tensor, width: Tensor | float) -> Tensor:
    r"""Squared maximum mean discrepancy, the unbiased estimate, exactly.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
        - \frac{2}{nm} \sum_{i,j} k(x_i, y_j), \qquad k(a, b) = e^{-\lVert a - b \rVert^2 / (2 s^2)}

    Its mean is 0 for two samples of one law, where it is skewed: judge it by permutations, never by 1.96 deviations.

    Args:
        x: Rows ``(n, D)``, two or more.
        y: Rows ``(m, D)``, two or more.
        width: :math:`s`; :func:`median_distance` of the reference, kept.

    Returns:
        0-dimensional, a little below 0 to 2.

    References:
        Gretton et al., *A Kernel Two-Sample Test*, JMLR 13, 2012.

    Example:
        >>> round(mmd2(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]), width=1.0).item(), 4)
        -0.3935
    """
    n, m = len(x), len(y)
    xx, yy, xy = (_kernel(a, b, width).sum() for a, b in ((x, x), (y, y), (x, y)))
    value: Tensor = (xx - n) / (n * (n - 1)) + (yy - m) / (m * (m - 1)) - 2 * xy / (n * m)
    return value


@full_precision
def median_distance(rows: Tensor) -> Tensor:
    """Median distance of two different rows ``(n, D)``: the usual width of the kernel.

    Example:
        >>> median_distance(torch.tensor([[0.0], [1.0], [4.0]]))
        tensor(3.)
    """
    value: Tensor = torch.pdist(rows).median()
    return value


@full_precision
def fourier_features(rows: Tensor, frequencies: Tensor) -> Tensor:
    r"""Random Fourier features, whose inner products are the Gaussian kernel on average; each has length 1.

    Args:
        rows: ``(n, D)``, about the mean of the reference: large means cost digits.
        frequencies: ``(D, F)``, drawn once from :math:`\mathcal N(0, s^{-2})`.

    Returns:
        ``(n, 2F)``.

    References:
        Rahimi & Recht, *Random Features for Large-Scale Kernel Machines*, NIPS 2007.

    Example:
        >>> round(fourier_features(torch.ones(1, 3), torch.randn(3, 50)).norm().item(), 4)
        1.0
    """
    angles: Tensor = rows @ frequencies.to(rows)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).div(frequencies.shape[1] ** 0.5)


def fourier_sums(features: Tensor) -> Tensor:
    """What adds up over batches and processes: the sum of the features ``(n, F)``, and their number; ``(F + 1,)``."""
    total = features.sum(dim=0, dtype=accumulation_dtype(features.device))
    return torch.cat([total, total.new_full((1,), len(features))])


def mmd2_of_sums(x: Tensor, y: Tensor, unbiased: bool = True) -> Tensor:
    r"""Squared maximum mean discrepancy from the :func:`fourier_sums` of two samples, shape ``(..., F + 1)`` each.

    .. math:: \frac{\lVert \Sigma_x \rVert^2 - n}{n(n-1)} + \frac{\lVert \Sigma_y \rVert^2 - m}{m(m-1)}
        - \frac{2\, \Sigma_x^\top \Sigma_y}{nm}

    Args:
        x: Of one sample.
        y: Of the other.
        unbiased: For independent samples. Of the same inputs, seen by two networks, take the plain squared distance of
            the means, which is 0 if these are equal.

    Returns:
        ``(...)``.

    Example:
        >>> one = fourier_sums(fourier_features(torch.eye(3), torch.eye(3)))
        >>> mmd2_of_sums(one, one, unbiased=False).item()
        0.0
    """
    (x, n), (y, m) = ((sums[..., :-1], sums[..., -1]) for sums in (x, y))
    if not unbiased:
        return (x / n.unsqueeze(-1) - y / m.unsqueeze(-1)).square().sum(dim=-1)
    own_x, own_y = ((sums.square().sum(dim=-1) - count) / (count * (count - 1)) for sums, count in ((x, n), (y, m)))
    return own_x + own_y - 2 * (x * y).sum(dim=-1) / (n * m)


@full_precision
def mmd2_null_deviation(features: Tensor, n: int, m: int) -> Tensor:
    r"""Standard deviation of the unbiased estimate for two samples of one law.

    .. math:: \sqrt{2 E \tilde k^2}\, (1/n + 1/m)

    :math:`E \tilde k^2` is the squared Frobenius norm of the covariance of the features, less what its noise adds.

    Args:
        features: :func:`fourier_features` of the reference.
        n: Rows of one sample.
        m: Rows of the other.

    References:
        Gretton et al., *A Kernel Two-Sample Test*, JMLR 13, 2012: :math:`8 E \tilde k^2/n^2` for n = m.
    """
    centered = features - features.mean(dim=0)
    covariance = centered.mT @ centered / (len(features) - 1)
    energy = covariance.square().sum() - covariance.trace().square() / len(features)
    deviation: Tensor = (2 * energy.clamp_min(0)).sqrt() * (1 / n + 1 / m)
    return deviation


def _kernel(a: Tensor, b: Tensor, width: Tensor | float) -> Tensor:
    # the product form of a distance is wrong where means are large
    squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (-squares / (2 * width**2)).exp()
