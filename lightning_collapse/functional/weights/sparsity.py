"""Sparsity of weights: how many are not zero, of all and of each unit."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.registry import register_measure


@register_measure(
    kind="weights",
    range="0 to 1",
    collapsed="near 0",
    source="share of weights that pruning has left",
    null=lambda rows, columns: 1.0,
)
@full_precision
def non_zero_share(weight: Tensor) -> Tensor:
    """Share of the elements of a matrix that are not exactly zero.

    Args:
        weight: Any shape.

    Returns:
        0-dimensional, 0 (nothing is left) to 1 (dense); NaN for no elements. NaN and infinity are not zero.

    Example:
        >>> non_zero_share(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor(0.2500)
    """
    return (weight != 0).to(weight.dtype).mean() if weight.numel() else weight.new_full((), torch.nan)


@register_measure(
    kind="weights",
    range="0 to the number of inputs",
    collapsed="below 1",
    source="weights that pruning has left, by unit",
    null=lambda rows, columns: float(columns),
)
@full_precision
def weights_per_unit(weight: Tensor) -> Tensor:
    """How many weights that are not zero an output unit has, on average.

    Below 1 some units have none and are constant: pruning has taken too much of this layer, however many weights the
    network still has. 1 is what a path through every unit takes at the least.

    Args:
        weight: One row per unit, shape ``(O, ...)``.

    Returns:
        0-dimensional, 0 (nothing is left) to the inputs of a unit (dense); NaN for no units.

    Example:
        >>> weights_per_unit(torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
        tensor(0.5000)
    """
    return (weight != 0).to(weight.dtype).sum() / (len(weight) or torch.nan)
