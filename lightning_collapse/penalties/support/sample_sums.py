"""Independence of samples: whether a sum over samples, each with a weight of its own, is what autograd says."""

import torch
from torch import Tensor

from lightning_collapse.penalties.support.output_gradients import Columns

WEIGHTS = (1.0, -2.0, 0.5, -1.0, 2.0, -0.5, 4.0, -4.0)
"""Of samples: powers of two, by which a backward pass is exact in any precision."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far a sum may be from autograd, in norm; what is wrong is wrong by far more."""
COARSE = 0.05
"""The same in 16 bits."""
GOLDEN = 0.6180339887498949


def is_near(found: Tensor, expected: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether two sums are the same but for rounding, of which numbers of a size of ``scale`` leave a hundredth.

    What is not finite has no size to compare: whoever asked for it will see.
    """
    error = torch.linalg.vector_norm(found - expected)
    return not error > TOLERANCE.get(dtype, COARSE) * (torch.linalg.vector_norm(expected) + 0.01 * scale)


def sample_weights(outputs: Tensor) -> Tensor:
    """A weight for every sample, ``(B, 1, ...)`` as outputs ``(B, ...)`` are: at random, but evenly."""
    samples = len(outputs)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(samples))
    weights = torch.tensor(WEIGHTS).repeat(samples // len(WEIGHTS) + 1)[:samples][order]
    return weights.to(outputs.device).view(-1, *[1] * (outputs.ndim - 1))


def column_weight(k: int) -> float:
    """Of the ``k``-th column where all are mixed: from 1 to 2, and 1 of the first."""
    return 1.0 + k * GOLDEN % 1.0


def mixed_column(columns: Columns, rows: int) -> Tensor:
    """All columns at once, each with its weight, of the first ``rows`` samples."""
    mixed = columns.make(0)
    for k in range(1, columns.number):
        mixed += column_weight(k) * columns.make(k)
    mixed[rows:] = 0
    return mixed
