"""Memory consolidation (LifeAlign): an update without its small singular values, damped where past ones went."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def consolidated_update(update: Tensor, past: Tensor | None = None, energy: float = 0.9, gamma: float = 0.1) -> Tensor:
    r"""What is kept of the change of a matrix in a task.

    .. math:: \Delta' = d - (1 - \gamma)\, H^T H d, \qquad d = \sum_{i \le k} \sigma_i u_i v_i^T

    with the fewest singular values whose squares reach ``energy`` of all, and the rows of :math:`H` an orthonormal
    basis of the past updates, flattened. Of these, directions with a singular value below 1e-6 of the largest are left
    out: the authors' code pads tasks with rows of zeros, for which a decomposition returns directions at random, which
    are then damped as well.

    Args:
        update: Shape ``(O, I)``.
        past: Updates of tasks before, flattened, shape ``(T, O * I)``; ``None`` for none.
        energy: Share of the squared singular values to keep, above 0; 1 keeps the update as it is.
        gamma: What stays along past updates; 1 keeps the update as it is, 0 leaves it orthogonal to all of them.

    Returns:
        Shape ``(O, I)``, at least ``float32``.

    Raises:
        ValueError: If a shape does not fit.

    References:
        *LifeAlign*, AAAI 2026; the code at https://github.com/real-ljs/LifeAlign.

    Example:
        >>> update = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> consolidated_update(update), consolidated_update(update, torch.eye(4)[:1], energy=1.0)
        (tensor([[3., 0.],
                [0., 0.]]), tensor([[0.3000, 0.0000],
                [0.0000, 1.0000]]))
    """
    if update.ndim != 2 or (past is not None and past.shape[1:] != (update.numel(),)):
        raise ValueError(
            "`update` must have shape (O, I) and `past` shape (T, O * I), got"
            f" {tuple(update.shape)} and {None if past is None else tuple(past.shape)}."
        )
    if energy < 1:
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        squares = values.square()
        kept = squares.cumsum(0) - squares < energy * squares.sum()  # what those before it leave open
        update = (left * (values * kept)) @ right
    if past is None or not len(past) or gamma == 1:
        return update
    _, values, rows = torch.linalg.svd(past.to(update), full_matrices=False)
    basis = torch.where((values > 1e-6 * values[0]).unsqueeze(1), rows, 0.0)
    return update - (1 - gamma) * ((basis @ update.flatten()) @ basis).view_as(update)
