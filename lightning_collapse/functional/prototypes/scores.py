"""Nearest class mean (NCM): logits of prototypes, by distance or by cosine."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_positive

DISTANCES = ("euclidean", "cosine")


@full_precision
def prototype_logits(
    features: Tensor, prototypes: Tensor, distance: str = "euclidean", temperature: float = 1.0
) -> Tensor:
    r""":math:`-\|x - \mu_c\|^2 / \tau`, or :math:`\cos(x, \mu_c) / \tau`: the largest is the nearest prototype.

    Args:
        features: Shape ``(..., D)``.
        prototypes: Shape ``(C, D)``; a row with NaN, of a class that nobody has seen, is nobody's nearest.
        distance: ``"euclidean"`` or ``"cosine"``.
        temperature: :math:`\tau`.

    Returns:
        Shape ``(..., C)``, at least ``float32``; minus infinity for a class without a prototype.

    Raises:
        ValueError: If a shape does not fit, there is no prototype, or an argument is out of range.

    References:
        Mensink et al., *Distance-based image classification*, TPAMI 2013; Rebuffi et al., *iCaRL*, CVPR 2017.
        https://arxiv.org/abs/1611.07725

    Example:
        >>> prototype_logits(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0], [0.0, 0.0]])).tolist()
        [[-4.0, -1.0]]
    """
    require_one_of(DISTANCES, distance=distance)
    require_positive(temperature=temperature)
    require_rows(features.shape[-1], prototypes=prototypes)
    there = prototypes.isfinite().all(dim=1)
    rows = torch.where(there.unsqueeze(1), prototypes, 0.0).to(features)
    if distance == "cosine":
        scores = unit_rows(features) @ unit_rows(rows).T
    else:
        # about the mean prototype: an offset that all share would cost the digits that decide
        center = rows.sum(dim=0) / there.sum().clamp_min(1)
        rows, moved = rows - center, features - center
        squares = moved.square().sum(dim=-1, keepdim=True) + rows.square().sum(dim=1)
        scores = (2 * moved @ rows.T - squares).clamp_max(0)
    return (scores / temperature).masked_fill(~there, -torch.inf)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows ``(..., D)`` over their length; zeros stay zeros, without a gradient."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    empty = lengths == 0  # and not what is no number
    return torch.where(empty, 0.0, rows / torch.where(empty, 1.0, lengths))


def require_rows(dim: int, **matrices: Tensor) -> None:
    """Refuse what has no rows of ``dim`` features.

    Raises:
        ValueError: If a matrix has another width, or none.
    """
    for name, rows in matrices.items():
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != dim or not rows.is_floating_point():
            raise ValueError(
                f"`{name}` must be floating point of shape (C, {dim}) with C >= 1, as wide as the features, got"
                f" {rows.dtype} of shape {tuple(rows.shape)}. Make it of rows of the same layer and network."
            )
