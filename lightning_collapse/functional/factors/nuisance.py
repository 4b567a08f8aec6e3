"""Nuisance factors: how much of the features' variation goes with the class, and how much with the domain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.cdnv import Cdnv, cdnv
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision


class NuisanceShares(NamedTuple):
    """Shares of the total sum of squares, which add up to 1; each of shape ``(4,)``.

    In order: between classes, between domains, interaction of both, residual within the cells.

    Attributes:
        shares: What was found, each 0 to 1; NaN for fewer than two rows and for rows that do not vary.
        null: What rows read on average that are dealt to the cells at random, degrees of freedom over ``N - 1``: of
            classes ``(G - 1) / (N - 1)`` with ``G`` classes.
    """

    shares: Tensor
    null: Tensor


@full_precision
def nuisance_shares(counts: Tensor, means: Tensor, scatters: Tensor) -> NuisanceShares:
    r"""Two-way analysis of variance of features, by class and by a nuisance factor such as a domain, from cell sums.

    With unbalanced cells the two factors overlap. They are taken in this order: classes, then domains adjusted for
    classes (their type-II sum of squares), then what the cells have beyond both. What cannot be told apart is the
    classes' share; swap the first two dimensions for the other reading. In balanced cells the order is of no
    consequence.

    Args:
        counts: Rows of each cell, shape ``(C, G)`` for ``C`` classes and ``G`` domains; cells may be empty.
        means: Their means, shape ``(C, G, D)``; those of empty cells do not matter.
        scatters: Sum of squared distances to the cell's mean, shape ``(C, G)``.

    Returns:
        Shares and their null. Waits for the device, as decompositions do.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Fisher, *Statistical Methods for Research Workers*, 1925; Yates, *JASA* 29, 1934 (unequal cells).

    Example:
        >>> means = torch.tensor([[[0.0], [2.0]], [[6.0], [8.0]]])  # classes 6 apart, domains 2
        >>> nuisance_shares(torch.full((2, 2), 5.0), means, torch.zeros(2, 2)).shares.round(decimals=6)
        tensor([0.9000, 0.1000, 0.0000, 0.0000], dtype=torch.float64)
    """
    n, rows = _cells(counts, means, scatters)
    by_class = n.sum(dim=1)
    class_means = (n.unsqueeze(2) * rows).sum(dim=1) / by_class.clamp_min(1).unsqueeze(1)
    between_class = (by_class.unsqueeze(1) * class_means.square()).sum()
    rest = rows - class_means.unsqueeze(1)
    cells = (n.unsqueeze(2) * rest.square()).sum()
    # normal equations of the domains once the classes are fitted: the Laplacian of a graph of domains
    domain_sums = (n.unsqueeze(2) * rest).sum(dim=0)
    laplacian = torch.diag(n.sum(dim=0)) - n.T @ (n / by_class.clamp_min(1).unsqueeze(1))
    values, vectors = torch.linalg.eigh(laplacian)
    free = values > 1e-9 * n.sum()
    along = (vectors.T @ domain_sums).square().sum(dim=1)
    domain = torch.where(free, along / torch.where(free, values, 1.0), 0.0).sum()
    residual = torch.where(n > 0, scatters.to(n), 0.0).sum()
    parts = torch.stack([between_class, domain, (cells - domain).clamp_min(0), residual])
    filled, classes = (n > 0).sum(), (by_class > 0).sum()
    freedom = torch.stack([classes - 1, free.sum(), filled - classes - free.sum(), n.sum() - filled])
    total = parts.sum()
    shares = torch.where((total > 0) & (n.sum() > 1), parts / total, torch.nan)
    return NuisanceShares(shares, torch.where(n.sum() > 1, freedom / (n.sum() - 1), torch.nan))


def nuisance_cdnv(counts: Tensor, means: Tensor, scatters: Tensor, debiased: bool = False) -> Cdnv:
    """Class-distance normalized variance of the domains: low where features cluster by the nuisance factor.

    Arguments as in :func:`nuisance_shares`; see :func:`~lightning_collapse.functional.cdnv` for what is returned.
    Features that know nothing of ``n`` rows per domain read about ``(n - 1) / 2``, and ``debiased`` corrects for it.

    Example:
        >>> means = torch.tensor([[[0.0], [2.0]], [[0.0], [2.0]]])
        >>> nuisance_cdnv(torch.full((2, 2), 5.0), means, torch.full((2, 2), 5.0)).mean
        tensor(0.2500, dtype=torch.float64)
    """
    n, rows = _cells(counts, means, scatters)
    by_domain = n.sum(dim=0)
    centers = (n.unsqueeze(2) * rows).sum(dim=0) / by_domain.clamp_min(1).unsqueeze(1)
    apart = n * (rows - centers).square().sum(dim=2) + torch.where(n > 0, scatters.to(n), 0.0)
    return cdnv(centers, apart.sum(dim=0) / by_domain.clamp_min(1), by_domain, debiased)


def _cells(counts: Tensor, means: Tensor, scatters: Tensor) -> tuple[Tensor, Tensor]:
    """Rows per cell, and means about the mean of all rows, zero where there are none."""
    if counts.ndim != 2 or scatters.shape != counts.shape or means.ndim != 3 or means.shape[:2] != counts.shape:
        found = ", ".join(str(tuple(part.shape)) for part in (counts, means, scatters))
        raise ValueError(
            f"`counts`, `means` and `scatters` must have shapes (C, G), (C, G, D) and (C, G), got {found}."
        )
    n = counts.to(accumulation_dtype(counts.device))
    filled = (n > 0).unsqueeze(2)
    rows = torch.where(filled, means.to(n), 0.0)
    center = (n.unsqueeze(2) * rows).sum(dim=(0, 1)) / n.sum().clamp_min(1)
    return n, torch.where(filled, rows - center, 0.0)
