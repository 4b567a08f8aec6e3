"""Scaled gradient projection: how important an input direction is, by its singular value."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_not_negative


@full_precision
def direction_importance(singular_values: Tensor, scale: float = 10.0) -> Tensor:
    r"""Importance of directions, :math:`\lambda_i = (a + 1) \sigma_i / (a \sigma_i + \sigma_{\max})` [1].

    Args:
        singular_values: Not negative, ``(..., K)``.
        scale: :math:`a`; with 0 importance is the relative singular value, and it grows to 1 with ``scale``.

    Returns:
        Shape ``(..., K)``, 0 (free) to 1 (fixed); 0 where all are 0.

    Raises:
        ValueError: If ``scale`` is negative.

    References:
        [1] Saha & Roy, *Continual Learning with Scaled Gradient Projection*, AAAI 2023, eq. 2.
        https://arxiv.org/abs/2302.01386

    Example:
        >>> direction_importance(torch.tensor([1.0, 0.5, 0.1, 0.01]))
        tensor([1.0000, 0.9167, 0.5500, 0.1000])
    """
    require_not_negative(scale=scale)
    largest = singular_values.amax(dim=-1, keepdim=True) if singular_values.shape[-1] else singular_values
    tiny = torch.finfo(singular_values.dtype).tiny
    return (scale + 1) * singular_values / (scale * singular_values + largest).clamp_min(tiny)


@full_precision
def accumulated_importance(
    second_moment: Tensor, directions: Tensor, importance: Tensor, scale: float = 10.0
) -> Tensor:
    r"""Importance of old directions and of new ones, after another task [1].

    The task says what every direction :math:`m` means to it by :math:`\sqrt{m^\top R R^\top m}`, mapped as in
    :func:`direction_importance`; to old ones that is added, up to 1.

    Args:
        second_moment: :math:`R R^\top` of the task's inputs, ``(D, D)``.
        directions: Orthonormal columns, old ones first, ``(D, K)``.
        importance: Of the old ones so far, ``(k,)`` with ``k <= K``.
        scale: :math:`a`.

    Returns:
        Shape ``(K,)``, 0 to 1.

    References:
        [1] Saha & Roy, AAAI 2023, and the authors' code. https://arxiv.org/abs/2302.01386

    Example:
        >>> accumulated_importance(torch.diag(torch.tensor([0.25, 1.0])), torch.eye(2), torch.tensor([0.05]))
        tensor([0.9667, 1.0000])
    """
    directions = directions.to(second_moment)
    energy = (directions * (second_moment @ directions)).sum(dim=0).clamp_min(0)
    now = direction_importance(energy.sqrt(), scale)
    now[: len(importance)] += importance.to(now)
    return now.clamp(0, 1)
