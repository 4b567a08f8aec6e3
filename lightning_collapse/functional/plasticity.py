"""Loss of plasticity: dead and dormant units."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def dormant_fraction(mean_absolute_activation: Tensor, tau: float = 0.025) -> Tensor:
    r"""Share of the units of a layer that are nearly silent beside the others.

    .. math:: \#\{i : s_i \le \tau\} / n, \quad s_i = \frac{E|h_i|}{\frac1n \sum_k E|h_k|}

    Args:
        mean_absolute_activation: :math:`E|h_i|` over data, shape ``(..., n)``.
        tau: Threshold :math:`\tau`; the paper shows 0.025 and resets units with it.

    Returns:
        Shape ``(...)``, 0 to 1; 1 for a layer that is all zero; NaN where a unit is not finite.

    Raises:
        ValueError: If ``tau`` is negative.

    References:
        Sokar et al., *The dormant neuron phenomenon in deep reinforcement learning*, ICML 2023.
        https://arxiv.org/abs/2302.12902

    Example:
        >>> dormant_fraction(torch.tensor([1.0, 0.0, 2.0, 0.01]))
        tensor(0.5000)
    """
    if not tau >= 0:
        raise ValueError(f"`tau` must not be negative, got {tau}.")
    level = mean_absolute_activation.mean(dim=-1, keepdim=True)
    # multiplied and not divided: of a layer that is all zero every unit is dormant
    dormant = (mean_absolute_activation <= tau * level).to(level.dtype).mean(dim=-1)
    return torch.where(mean_absolute_activation.isfinite().all(dim=-1), dormant, torch.nan)


@full_precision
def dead_fraction(active: Tensor, threshold: float = 0.01) -> Tensor:
    r"""Share of the units of a layer that are active on fewer than a share ``threshold`` of the samples.

    Args:
        active: Share of the samples on which each unit is active, which for a rectifier means not zero, shape
            ``(..., n)``.
        threshold: 0.01 as in the paper.

    Returns:
        Shape ``(...)``, 0 to 1; NaN where a share is.

    Raises:
        ValueError: If ``threshold`` is out of range.

    References:
        Dohare et al., *Loss of plasticity in deep continual learning*, Nature 2024.
        https://arxiv.org/abs/2306.13812

    Example:
        >>> dead_fraction(torch.tensor([0.0, 0.005, 0.5, 1.0]))
        tensor(0.5000)
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be above 0 and at most 1, got {threshold}.")
    dead = (active < threshold).to(active.dtype).mean(dim=-1)
    return torch.where(active.isnan().any(dim=-1), torch.nan, dead)
