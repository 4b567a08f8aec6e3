"""Rows around centers, with a linear map of its own around each: what a mixture of experts is for."""

import torch
from torch import Tensor

CLUSTERS, INPUTS, SIZE = 8, 8, 128
_FIXED = torch.Generator().manual_seed(0)
CENTERS, MAPS = (
    6 + 3 * torch.randn(CLUSTERS, INPUTS, generator=_FIXED),
    torch.randn(CLUSTERS, INPUTS, 4, generator=_FIXED),
)


def patches(clusters: int, generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
    """Rows ``(N, 8)`` around centers, and another linear map around each."""
    cluster = torch.randint(clusters, (SIZE,), generator=generator)
    noise = torch.randn(SIZE, INPUTS, generator=generator)
    return CENTERS[cluster] + noise, torch.einsum("ni,nij->nj", noise, MAPS[cluster])
