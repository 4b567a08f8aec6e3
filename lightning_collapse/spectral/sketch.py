"""Random projection of features too wide for a second moment."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


class GaussianSketch:
    r"""Projects features by a fixed Gaussian matrix, the same on every process and in every run.

    .. math:: y = \Omega^\top x, \quad \Omega_{ij} \sim \mathcal{N}(0, 1 / D), \quad
        \mathbb{E} \operatorname{tr} S_y^2 \propto
        (1 + \tfrac{1}{k}) \operatorname{tr} S_x^2 + \tfrac{1}{k} (\operatorname{tr} S_x)^2

    The mean variance of a feature is kept on average, so standard deviations keep their meaning; the second identity
    lets the participation ratio be corrected, up to terms of order 1 / k
    (:func:`~lightning_collapse.functional.participation_ratio` of a record with ``sketched=True`` does). Entropic ranks
    cannot be corrected: they describe the projection and never exceed ``k``.

    Args:
        dim: Number of features ``D`` to project.
        size: Width ``k`` of the projection.
        device: Where the matrix lives.

    Example:
        >>> sketch = GaussianSketch(dim=1000, size=64)
        >>> rows = torch.ones(2, 1000)
        >>> sketch(rows).shape
        torch.Size([2, 64])
    """

    def __init__(self, dim: int, size: int, device: torch.device | str | None = None) -> None:
        generator = torch.Generator().manual_seed(dim)  # its own generator: the global random state is the user's
        self.matrix = (torch.randn(dim, size, generator=generator, dtype=torch.float32, device="cpu") / dim**0.5).to(
            device
        )

    @full_precision
    def __call__(self, features: Tensor) -> Tensor:
        """Features of shape ``(N, D)`` as ``(N, k)``, ``float32`` or ``float64``."""
        projected: Tensor = features @ self.matrix.to(features)
        return projected
