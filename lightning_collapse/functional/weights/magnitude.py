"""Magnitude collapse: how much of the spread and size of activations a merged, pruned or aged network has left."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def std_ratio(std: Tensor, reference: Tensor) -> Tensor:
    r"""Standard deviation of the units of a layer over that of a reference network, mean over units (REPAIR).

    .. math:: r = \frac1n \sum_c \sigma_c / \sigma_c^\text{ref}

    Weights that are the average of two networks' give activations that cancel: of two independent units of zero mean
    and equal spread with weights :math:`\alpha` and :math:`1 - \alpha` the ratio is
    :math:`\sqrt{\alpha^2 + (1 - \alpha)^2}`, 0.707 in the middle. A ratio that falls with depth is variance collapse.

    Args:
        std: Of every unit over data, shape ``(..., n)``.
        reference: Of the same units in the reference, on the same data; for a merged network the mean of what its
            endpoints have, weighted as they are.

    Returns:
        Shape ``(...)``, 0 (nothing varies) to infinity, 1 for no change; units that are constant in the reference do
        not count; NaN where none varies there, or one that counts is not finite.

    References:
        Jordan et al., *REPAIR: REnormalizing Permuted Activations for Interpolation Repair*, ICLR 2023.
        https://arxiv.org/abs/2211.08403; Qu & Horvath, *Rethinking Model Re-Basin and Linear Mode Connectivity*, 2024.
        https://arxiv.org/abs/2402.05966

    Example:
        >>> std_ratio(torch.tensor([0.7, 0.5, 3.0]), torch.tensor([1.0, 1.0, 0.0]))
        tensor(0.6000)
    """
    counts = reference != 0
    ratio = torch.where(counts, std / torch.where(counts, reference, 1.0), 0.0)
    return ratio.sum(dim=-1) / counts.sum(dim=-1)


@full_precision
def magnitude_ratio(mean_absolute_activation: Tensor, reference: Tensor) -> Tensor:
    r"""Mean size of the activations of a layer over that in a reference network, :math:`E|a| / E|a^\text{ref}|`.

    Args:
        mean_absolute_activation: :math:`E|a_c|` of every unit over data, shape ``(..., n)``.
        reference: The same in the reference, on the same data.

    Returns:
        Shape ``(...)``, 0 (silent) to infinity, 1 for no change; NaN where the reference is silent.

    References:
        Qu & Horvath, 2024. https://arxiv.org/abs/2402.05966

    Example:
        >>> magnitude_ratio(torch.tensor([0.5, 1.5]), torch.tensor([2.0, 2.0]))
        tensor(0.5000)
    """
    level = reference.mean(dim=-1)
    return torch.where(level != 0, mean_absolute_activation.mean(dim=-1) / level, torch.nan)
