"""Random directions that depend on a counter alone: equal on all processes, and no random number of the training."""

import math

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.hashing import GOLDEN, hashed


@full_precision  # autocast would take the norm in single precision
def random_directions(dim: int, count: int, step: Tensor, stream: int = 0) -> Tensor:
    """Columns drawn uniformly from the unit sphere.

    A counter-based generator: element ``i`` at a step is a hash of both, so that no state has to be kept or sent, the
    device is never waited for, and ``torch.compile`` traces through it.

    Args:
        dim: Number of features ``D``.
        count: Number of directions ``M``.
        step: Number of the draw, a 0-dimensional integer tensor on the device where the directions are wanted.
        stream: Another number gives other directions at the same step.

    Returns:
        Shape ``(D, M)``, ``float64`` where the device has it.

    Example:
        >>> directions = random_directions(3, 100, torch.tensor(7))
        >>> directions.norm(dim=0).allclose(torch.ones(100, dtype=torch.float64)), tuple(directions.shape)
        (True, (3, 100))
    """
    device = step.device
    key = hashed(step * GOLDEN + stream)
    bits = hashed(key + torch.arange(1, dim * count + 1, device=device).view(dim, count) * GOLDEN)
    # two uniform numbers of 26 bits, in the middle of their cells and so never 0
    dtype = accumulation_dtype(device)
    first, second = (((bits >> shift & (2**26 - 1)).to(dtype) + 0.5) / 2**26 for shift in (38, 6))
    normal = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()  # Box-Muller
    directions: Tensor = normal / normal.norm(dim=0).clamp_min(torch.finfo(dtype).tiny)
    return directions
