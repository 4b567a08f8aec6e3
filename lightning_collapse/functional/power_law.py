"""Power-law exponent of the tail of a weight spectrum (heavy-tailed self-regularization)."""

from functools import lru_cache
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.isotropic_null import marchenko_pastur_quantiles
from lightning_collapse.spectral.deterministic import running_sum
from lightning_collapse.spectral.precision import full_precision

EQUAL = 1e-5
"""Logarithms of eigenvalues that differ by less in the mean are equal: singular values in ``float32`` are rounded."""
CHUNK = 1 << 22
"""Most elements of the table of candidates that are in memory at once."""


class PowerLaw(NamedTuple):
    r"""A fit of :math:`p(\lambda) \propto \lambda^{-\alpha}` to the eigenvalues from :math:`x_{\min}` on.

    Attributes:
        alpha: The exponent; NaN where there is nothing to fit.
        ks_distance: Kolmogorov-Smirnov distance between the tail and the law, 0 to 1.
        tail_count: Number of eigenvalues in the tail; 0 where there is nothing to fit.
        standard_error: Of the exponent, :math:`(\alpha - 1) / \sqrt{n}`, given :math:`x_{\min}`.
        xmin: Where the tail begins: the smallest eigenvalue in it.
    """

    alpha: Tensor
    ks_distance: Tensor
    tail_count: Tensor
    standard_error: Tensor
    xmin: Tensor


@torch.no_grad()
@full_precision
def power_law_alpha(eigenvalues: Tensor, min_tail: int = 10) -> PowerLaw:
    r"""Exponent of the power law that fits the tail of a spectrum best, by maximum likelihood.

    .. math:: \alpha = 1 + n \Big/ \sum_{\lambda_i \ge x_{\min}} \log(\lambda_i / x_{\min})

    with :math:`x_{\min}` the eigenvalue at which the Kolmogorov-Smirnov distance is smallest. The distance is the exact
    supremum over both sides of every step of the empirical distribution, so that a tail of ``n`` points never has one
    below ``1 / 2n``; common implementations take one side, which favours tails of a few points.

    The literature reads an exponent of a trained weight matrix between 2 and 6 as healthy, more as under-trained, less
    as over-trained. **A random matrix has an exponent too**, about 4 to 10 depending on its shape
    (:func:`power_law_null`), and a fit to a dozen points is noise: never read ``alpha`` without ``tail_count`` and
    ``ks_distance``. Nothing waits for the device.

    Args:
        eigenvalues: Squared singular values, in any order, shape ``(..., K)``. Those below ``K`` times the rounding of
            the largest are left out.
        min_tail: Fewest eigenvalues in a tail.

    Returns:
        Five tensors of shape ``(...)``; exponent, distance, error and ``xmin`` NaN where fewer than ``min_tail``
        eigenvalues are positive, all are equal to five digits, or one is NaN or infinite.

    Raises:
        ValueError: If ``min_tail`` is less than 2.

    References:
        Clauset, Shalizi & Newman, *Power-law distributions in empirical data*, SIAM Review 2009.
        https://arxiv.org/abs/0706.1062
        Martin & Mahoney, *Implicit Self-Regularization in Deep Neural Networks*, JMLR 2021.
        https://arxiv.org/abs/1810.01075

    Example:
        >>> law = power_law_alpha((torch.arange(1, 1001) - 0.5).div(1000) ** -0.5)  # quantiles of alpha = 3
        >>> round(law.alpha.item(), 1), int(law.tail_count)
        (3.0, 1000)
    """
    if min_tail < 2:
        raise ValueError(f"`min_tail` must be at least 2, got {min_tail}.")
    flat = eigenvalues.reshape(-1, eigenvalues.shape[-1])
    if flat.device.type != "mps":
        flat = flat.double()
    size = flat.shape[-1]
    if size < min_tail or not len(flat):
        none = eigenvalues.new_full(eigenvalues.shape[:-1], torch.nan)
        return PowerLaw(none, none, torch.zeros_like(none), none, none)
    values = flat.sort(dim=-1).values
    top = values[:, -1:]
    present = values > size * torch.finfo(torch.float32).eps ** 2 * top
    log = torch.where(present, values, 1.0).log()
    count = torch.arange(size, 0, -1, device=values.device, dtype=values.dtype)
    # sum over the tail of log(value / xmin), for every value as xmin
    excess = running_sum(log.flip(-1)).flip(-1) - count * log
    first = torch.ones_like(present)
    first[:, 1:] = values[:, 1:] > values[:, :-1]  # of equal values the tail holds all
    candidate = present & first & (excess > EQUAL * count) & (count >= min_tail)
    rate = count / torch.where(candidate, excess, 1.0)
    distance = torch.where(candidate, _distances(log, rate), torch.inf)
    best = distance.argmin(dim=-1, keepdim=True)
    found = candidate.any(dim=-1) & values.isfinite().all(dim=-1)

    def pick(table: Tensor, without: float = nan) -> Tensor:
        chosen = table.expand_as(values).gather(-1, best).squeeze(-1)
        return torch.where(found, chosen, without).view(eigenvalues.shape[:-1]).to(eigenvalues.dtype)

    return PowerLaw(pick(rate + 1), pick(distance), pick(count, 0.0), pick(rate / count.sqrt()), pick(values))


@lru_cache(maxsize=4096)
def power_law_null(rows: int, columns: int, min_tail: int = 10) -> float:
    """Exponent that :func:`power_law_alpha` reads from the Marchenko-Pastur law of a random matrix of this shape.

    From the quantiles of the law, without the fluctuation of single matrices.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        min_tail: As there.

    Returns:
        The exponent; NaN if the smaller side is less than ``min_tail``.

    Example:
        >>> round(power_law_null(64, 32), 2)
        3.32
    """
    quantiles = torch.from_numpy(marchenko_pastur_quantiles(max(rows, columns), min(rows, columns)))
    return power_law_alpha(quantiles, min_tail).alpha.item()  # of numbers on the host


def _distances(log: Tensor, rate: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of every tail to its own law; ``log`` ascending ``(B, K)``, ``rate`` ``(B, K)``."""
    size = log.shape[-1]
    index = torch.arange(size, device=log.device)
    distances = torch.empty_like(log)
    step = max(CHUNK // max(log.numel(), 1), 1)
    for start in range(0, size, step):
        of_tail = index[start : start + step]
        inside = index >= of_tail.unsqueeze(1)
        count = (size - of_tail).to(log.dtype).unsqueeze(1)
        before = (index - of_tail.unsqueeze(1)) / count
        law = -torch.expm1(rate[:, of_tail, None] * (log[:, of_tail, None] - log.unsqueeze(1)))
        gap = torch.maximum((law - before).abs(), (law - before - 1 / count).abs())
        distances[:, of_tail] = torch.where(inside, gap, 0.0).amax(dim=-1)
    return distances
