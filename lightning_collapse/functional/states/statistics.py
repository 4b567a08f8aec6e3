"""State statistics: moments and effective rank of every head's state, at some places of a sequence."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.rank import effective_rank
from lightning_collapse.spectral.eigenvalues import eigenvalues, safe_sqrt
from lightning_collapse.spectral.precision import accumulation_dtype

_LARGEST = torch.finfo(torch.float32).max
_FLOOR = 1e-8


class StateStatistics(NamedTuple):
    """Of every place and head, shape ``(P, H)``: mean, variance and RMS of the entries, effective rank of the rows."""

    mean: Tensor
    variance: Tensor
    rms: Tensor
    effective_rank: Tensor


@torch.no_grad()
def state_statistics(states: Tensor, counted: Tensor | None = None) -> StateStatistics:
    """Statistics of states, never averaged over heads: it is a few of them that fail.

    Infinity, and what is no number after it was one, counts as the largest number of ``float32``: it is what a state
    that explodes comes to.

    Args:
        states: Of ``N`` sequences at ``P`` places, shape ``(N, P, H, R, F)``: heads whose states are matrices of ``R``
            rows, or one row. Any dtype, computed in ``float64`` where the device has it.
        counted: Boolean ``(N,)``: sequences that count, all by default. Those with NaN in the first place never do.

    Returns:
        The statistics. The effective rank is of all rows of a head, centered: 0 where they are equal (one sequence with
        one row), at most ``min(N R - 1, F)``.

    References:
        Chen et al., *Stuffed Mamba*, 2024. https://arxiv.org/abs/2410.07145

    Example:
        >>> states = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1).expand(2, 3, 1, 1, 4)
        >>> state_statistics(states).rms.T, state_statistics(states).effective_rank.T
        (tensor([[1., 1., 1.]], dtype=torch.float64), tensor([[1., 1., 1.]], dtype=torch.float64))
    """
    wide = states.to(accumulation_dtype(states.device))
    kept = wide[:, 0].flatten(1).isfinite().all(dim=1)
    kept = kept if counted is None else kept & counted
    factor = kept.view(-1, 1, 1, 1, 1)
    wide = wide.nan_to_num(_LARGEST, _LARGEST, -_LARGEST).where(factor, 0.0)
    rows = (kept.sum() * wide.shape[3]).to(wide)
    number = rows * wide.shape[4]
    mean = wide.sum(dim=(0, 3, 4)) / number
    variance = (wide - mean[:, :, None, None]).where(factor, 0.0).square().sum(dim=(0, 3, 4)) / number
    matrix = wide.permute(1, 2, 0, 3, 4).flatten(2, 3)
    present = factor.expand(-1, 1, 1, wide.shape[3], 1).permute(1, 2, 0, 3, 4).flatten(2, 3)
    # in units of the largest entry, so that no square overflows where the device has no float64
    matrix = matrix / matrix.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    matrix = (matrix - matrix.sum(dim=-2, keepdim=True) / rows).where(present, 0.0)
    small = matrix @ matrix.mT if matrix.shape[-2] < matrix.shape[-1] else matrix.mT @ matrix
    rank = effective_rank(safe_sqrt(eigenvalues(small)))
    return StateStatistics(mean, variance, (variance + mean.square()).sqrt(), rank.where(number > 0, torch.nan))


def head_growth(before: Tensor, after: Tensor) -> Tensor:
    r"""Log ratio of each head's variance to what it was, :math:`\ln(v_{2T} / v_T)`: take the largest, not the mean.

    About 1.39 for a head that adds up what it reads, 0.69 for a random walk, 0 in a steady state, and twice the steps
    times :math:`\ln\rho` for one that explodes at the rate :math:`\rho`.

    Args:
        before: Variances of the heads, shape ``(..., H)``, at the length of training.
        after: The same at twice that.

    Returns:
        Shape ``(..., H)``, any number. Heads whose variance is 1e-8 of the largest one are read as if it were that.

    References:
        Chen et al., *Stuffed Mamba*, 2024. https://arxiv.org/abs/2410.07145

    Example:
        >>> head_growth(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 0.0]))
        tensor([0.0000, 1.3863, 0.0000])
    """
    floor = (_FLOOR * before.amax(dim=-1, keepdim=True)).clamp_min(torch.finfo(before.dtype).tiny)
    return (torch.maximum(after, floor) / torch.maximum(before, floor)).log()
