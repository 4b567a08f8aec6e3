"""Fisher discriminant ratio: scatter between the classes in units of the scatter within them."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import (
    centered_means,
    in_input_precision,
    present_rows,
    rounding_variance,
)
from lightning_collapse.spectral.eigenvalues import eigenvectors


@in_input_precision
def fisher_discriminant_ratio(
    means: Tensor,
    within: Tensor,
    counts: Tensor | None = None,
    log: bool = False,
    *,
    resolution: float | Tensor | None = None,
) -> Tensor:
    r"""Fisher discriminant ratio of features and classes.

    .. math:: \operatorname{tr}(S_W^{-1} S_B) = \sum_i \frac{\rho_i^2}{1 - \rho_i^2}, \quad
        S_B = \sum_c n_c (\mu_c - \mu)(\mu_c - \mu)^\top

    with the canonical correlations :math:`\rho_i` of features and labels, of which
    :func:`~lightning_collapse.functional.vci` is another function. Unchanged by any invertible linear map. Features
    that do not vary are dropped. It has no upper end: draw the logarithm, and beside it that of
    :func:`fisher_discriminant_null`.

    Args:
        means: Class means, shape ``(C, D)``.
        within: :math:`S_W / N`, shape ``(D, D)``.
        counts: Rows of each class, shape ``(C,)``; a class without rows is left out. Classes weigh alike if ``None``.
        log: Return the natural logarithm.
        resolution: Relative rounding of the features, as in :func:`~lightning_collapse.functional.nc1`.

    Returns:
        0-dimensional, 0 (means coincide) to infinity: exactly collapsed along some direction, as ``N < D + C`` rows in
        general position are, whatever they are. NaN for fewer than two classes.

    Raises:
        ValueError: If a shape does not fit.

    References:
        Fisher, *Annals of Eugenics* 7, 1936; Hotelling, *Biometrika* 28, 1936.

    Example:
        >>> fisher_discriminant_ratio(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.eye(2) / 2)
        tensor(2.)
    """
    rounding = rounding_variance(means, within, counts, resolution)
    rows, present, classes = present_rows(means, counts)
    share = (present if counts is None else torch.where(present, counts, 0)).to(rows)
    share = share / share.sum()
    rows = centered_means(means, counts, share @ rows).rows * share.sqrt().unsqueeze(1)
    variance = within.diagonal().to(rows)
    alive = variance > rounding
    collapsed = (~alive & (rows.square().sum(dim=0) > rounding)).any()
    # in units of each feature's own spread, so that small features are no noise
    scale = torch.where(alive, torch.where(alive, variance, 1.0).rsqrt(), 0.0)
    values, vectors = eigenvectors(within.to(rows) * torch.outer(scale, scale))
    along = ((rows * scale) @ vectors).square().sum(dim=0)
    noise = (rounding * scale.square()) @ vectors.square()
    eps = len(values) * torch.finfo(rows.dtype).eps
    flat = values <= noise.maximum(eps * values[:1])
    collapsed |= (flat & (along > noise + eps * along.sum())).any()
    ratio = torch.where(flat, 0.0, along / torch.where(flat, 1.0, values)).sum()
    ratio = torch.where(collapsed, torch.inf, ratio)
    return torch.where(classes > 1, ratio.log() if log else ratio, nan)


def fisher_discriminant_null(n: float, num_classes: int, dim: int) -> float:
    r"""What :func:`fisher_discriminant_ratio` reads on average of Gaussian features that know nothing of the classes.

    .. math:: \frac{D (C - 1)}{N - C - D - 1}

    Exact, by the expected inverse of a Wishart matrix. A single reading scatters about it by 10 to 30 %.

    Args:
        n: Rows over all classes.
        num_classes: Number of classes ``C``.
        dim: Number of features ``D``.

    Returns:
        0 or more; infinity unless ``n > C + D + 1``.

    Example:
        >>> fisher_discriminant_null(100, 3, 16)
        0.4
    """
    spare = n - num_classes - dim - 1
    return dim * (num_classes - 1) / spare if spare > 0 else float("inf")
