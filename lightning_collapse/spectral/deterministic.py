"""Deterministic forms of functions that torch refuses on CUDA where ``Trainer(deterministic=True)`` asks for such."""

import torch
from torch import Tensor


def nan_median(values: Tensor, dim: int) -> Tensor:
    """The lower median along a dimension, NaN left out: ``values.nanmedian(dim).values``, which CUDA may refuse.

    Example:
        >>> nan_median(torch.tensor([[4.0, torch.nan, 1.0, 2.0, 3.0], [torch.nan] * 5]), dim=1)
        tensor([2., nan])
    """
    ordered = values.sort(dim=dim).values  # NaN is last
    count = values.isnan().logical_not().sum(dim=dim, keepdim=True)
    return ordered.gather(dim, (count - 1).clamp_min(0) // 2).squeeze(dim)


def running_sum(values: Tensor, dim: int = -1) -> Tensor:
    """Sums of all numbers up to each: ``values.cumsum(dim)``, and where CUDA may refuse that the same by doubling.

    Example:
        >>> running_sum(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        tensor([ 1.,  3.,  7., 15.])
    """
    if not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(dim)
    sums, width = values.movedim(dim, -1), 1
    while width < values.shape[dim]:
        sums = sums + torch.nn.functional.pad(sums[..., :-width], (width, 0))
        width *= 2
    return sums.movedim(-1, dim)
