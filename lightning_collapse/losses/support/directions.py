"""Random directions that depend on a counter alone: equal on all processes, and no random number of the training."""

import math

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision

# the finalizer of SplitMix64 (Steele, Lea & Flood, 2014), its constants as signed numbers
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


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
    key = _hash(step * GOLDEN + stream)
    bits = _hash(key + torch.arange(1, dim * count + 1, device=device).view(dim, count) * GOLDEN)
    # two uniform numbers of 26 bits, in the middle of their cells and so never 0
    dtype = accumulation_dtype(device)
    first, second = (((bits >> shift & (2**26 - 1)).to(dtype) + 0.5) / 2**26 for shift in (38, 6))
    normal = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()  # Box-Muller
    directions: Tensor = normal / normal.norm(dim=0).clamp_min(torch.finfo(dtype).tiny)
    return directions


def _hash(x: Tensor) -> Tensor:
    for shift, factor in zip((30, 27), MIX, strict=True):
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros; that of signed numbers fills with their sign."""
    shifted: Tensor = x >> bits & (2 ** (64 - bits) - 1)
    return shifted
