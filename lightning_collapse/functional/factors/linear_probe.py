"""Feature suppression: which labelled factors a linear probe still finds in a representation."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvectors
from lightning_collapse.spectral.moments import Moments
from lightning_collapse.spectral.precision import full_precision


def linear_probe(
    features: Tensor, targets: Tensor, held_out_features: Tensor, held_out_targets: Tensor, ridge: float = 1e-3
) -> Tensor:
    r"""Held-out coefficient of determination of a ridge regression from features to each column of targets.

    .. math:: R^2 = 1 - \frac{\sum \|y - \bar y_{\mathrm{train}} - W^\top (x - \bar x_{\mathrm{train}})\|^2}
        {\sum \|y - \bar y_{\mathrm{train}}\|^2}, \quad
        W = (S_{xx} + \lambda I)^{-1} S_{xy}, \quad \lambda = \texttt{ridge} \cdot \operatorname{tr}(S_{xx}) / D

    A factor that an encoder has suppressed (in favour of an easier one, or because augmentations vary it) reads 0 or
    less, on whichever layer. Compare with the same probe on the inputs or on an earlier layer: a difference is what
    was lost on the way. :class:`~lightning_collapse.metrics.LinearProbe` streams it for labels.

    Args:
        features: To fit on, shape ``(N, D)``.
        targets: Shape ``(N, K)``, for classes one-hot rows.
        held_out_features: To judge on, shape ``(M, D)``.
        held_out_targets: Shape ``(M, K)``.
        ridge: Strength, in units of the mean variance of a feature.

    Returns:
        Shape ``(K,)``, ``float64``, at most 1; on average ``-D / (N - D - 2)`` or more for Gaussian features that know
        nothing of the targets; NaN for targets that do not vary.

    Raises:
        ValueError: If a shape does not fit or ``ridge`` is negative.

    References:
        Alain, Bengio, *Understanding intermediate layers using linear classifier probes*, 2016,
        https://arxiv.org/abs/1610.01644. Feature suppression: Chen, Luo, Li, NeurIPS 2021,
        https://arxiv.org/abs/2011.02803; Robinson et al., NeurIPS 2021, https://arxiv.org/abs/2106.11230.

    Example:
        >>> x = torch.arange(6.0).view(6, 1)
        >>> targets = torch.cat([2 * x, torch.ones(6, 1)], dim=1)
        >>> linear_probe(x[:4], targets[:4], x[4:], targets[4:], ridge=0.0).round(decimals=6)
        tensor([1., nan], dtype=torch.float64)
    """
    if ridge < 0:
        raise ValueError(f"`ridge` must not be negative, got {ridge}.")
    dim, parts = features.shape[-1], []
    for x, y in ((features, targets), (held_out_features, held_out_targets)):
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"Features and targets must have shapes (N, D) and (N, K), got {x.shape} and {y.shape}.")
        parts.append(Moments(dim + targets.shape[1], x.device))
        parts[-1].update(torch.cat([x, y.to(x)], dim=1))
    error, total = probe_errors(parts[0], parts[1], dim, ridge)
    return torch.where(total > 0, 1 - error / total, torch.nan)


@full_precision
def probe_errors(train: Moments, held_out: Moments, dim: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Sums of squares over held-out rows, each ``(K,)``: what the probe leaves, and what the mean leaves.

    Args:
        train: Moments of rows of ``dim`` features and ``K`` targets.
        held_out: Those of other rows.
        dim: How many of the columns are features.
        ridge: As in :func:`linear_probe`.
    """
    scatter, other = train.scatter, held_out.about(train.mean).second
    values, vectors = eigenvectors(scatter[:dim, :dim])
    shrunk = values + ridge * values.mean()
    alive = values > dim * torch.finfo(values.dtype).eps * values[:1]
    inverse = torch.where(alive, 1 / torch.where(alive, shrunk, 1.0), 0.0)
    weight = vectors @ (inverse.unsqueeze(1) * (vectors.T @ scatter[:dim, dim:]))
    total = other[dim:, dim:].diagonal()
    # the quadratic form of (-W, 1): what is left of each target, from second moments alone
    explained = 2 * (weight * other[:dim, dim:]).sum(dim=0) - (weight * (other[:dim, :dim] @ weight)).sum(dim=0)
    return total - explained, total
