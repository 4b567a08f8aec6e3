"""Subspace overlap: whether the leading directions of features are still those they were."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def top_directions(rows: Tensor, k: int) -> Tensor:
    """The ``k`` principal directions of rows ``(n, D)``, as columns ``(D, k)``."""
    centered = rows - rows.mean(dim=0)
    vectors: Tensor = torch.linalg.eigh(centered.mT @ centered).eigenvectors
    return vectors[:, -k:]


@full_precision
def subspace_overlap(x: Tensor, y: Tensor) -> Tensor:
    r"""Share of one subspace that lies in another, :math:`\lVert U_1^\top U_2 \rVert_F^2 / k`.

    Only directions behind a gap of the spectrum stay where they are: two samples of one isotropic law overlap no more
    than two of different ones.

    Args:
        x: An orthonormal basis ``(D, k)``, such as :func:`top_directions`.
        y: Another one.

    Returns:
        0-dimensional, 0 to 1.

    Example:
        >>> subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        tensor(0.5000)
    """
    value: Tensor = (x.mT @ y).square().sum() / x.shape[1]
    return value


def overlap_null(k: int, d: int) -> float:
    """Mean of :func:`subspace_overlap` for two random subspaces, ``k / d``."""
    return k / d
