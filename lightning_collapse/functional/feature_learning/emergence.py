"""Feature emergence: whether hidden units already follow the labels, each by itself, or still their random start."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.arguments import require_positive

MOST = 2000
"""Samples: a system of as many equations is solved."""


@torch.no_grad()
@full_precision
def emergence_cosine(features: Tensor, targets: Tensor, ridge: float = 1e-4) -> Tensor:
    r"""Cosine of the gradient at hidden units with the gradient that each unit would follow by itself.

    With the top layer at its ridge solution :math:`V = (\tilde F^\top \tilde F + \eta I)^{-1} \tilde F^\top \tilde Y`
    (columns without their means) the hidden units get

    .. math:: G = (\tilde Y - \tilde F V) V^\top = \eta\, (\tilde F \tilde F^\top + \eta I)^{-1} \tilde Y \tilde Y^\top
        (\tilde F \tilde F^\top + \eta I)^{-1} \tilde F

    which is along :math:`\tilde Y \tilde Y^\top \tilde F`, the gradient of the energy
    :math:`\tfrac12 \|\tilde Y^\top f\|^2` of every unit, while features are random and many: the stage in which units
    learn independently. It dips where there are about as many units as samples.

    Args:
        features: Hidden activities, shape ``(n, K)``, ``n`` at most 2,000.
        targets: Shape ``(n, M)``, of classes one-hot rows.
        ridge: :math:`\eta`.

    Returns:
        0-dimensional, -1 to 1, ``float64`` where the device has it; NaN where either gradient is zero.

    Raises:
        ValueError: If a shape does not fit, there are too many samples, or ``ridge`` is not positive.

    References:
        Tian, *Provable scaling laws of feature emergence from learning dynamics of grokking*, 2025,
        https://arxiv.org/abs/2509.21519

    Example:
        >>> x = torch.randn(20, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> bool(emergence_cosine(x, torch.eye(2, dtype=torch.float64).repeat(10, 1)) > 0.95)
        True
    """
    require_positive(ridge=ridge)
    if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
        raise ValueError(
            f"`features` and `targets` must have shapes (n, K) and (n, M), got {tuple(features.shape)} and"
            f" {tuple(targets.shape)}."
        )
    if len(features) > MOST:
        raise ValueError(f"`features` may have {MOST} samples at most, got {len(features)}. Draw a part of them.")
    dtype = accumulation_dtype(features.device)
    f, y = (part.to(dtype) - part.to(dtype).mean(dim=0) for part in (features, targets))
    if f.shape[1] <= len(f):
        head = torch.linalg.solve(f.T @ f + ridge * torch.eye(f.shape[1], dtype=dtype, device=f.device), f.T @ y)
        residual = y - f @ head
    else:
        residual = torch.linalg.solve(f @ f.T + ridge * torch.eye(len(f), dtype=dtype, device=f.device), y)
        head = f.T @ residual  # the residual's factor `ridge` is no matter of a cosine
    gradient, alone = residual @ head.T, y @ (y.T @ f)
    norms = gradient.norm() * alone.norm()
    return torch.where(norms > 0, (gradient * alone).sum() / norms, torch.nan)
