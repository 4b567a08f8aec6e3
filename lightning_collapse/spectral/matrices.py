"""Singular values of many matrices at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvalues, safe_sqrt
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision

BATCH_ELEMENTS = 1 << 22
"""Most elements of the Gram matrices that are decomposed at once: it bounds the memory."""


def alike(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices that can be decomposed together: of one size, whichever way they lie, and on one device."""
    groups: dict[tuple[int, int, torch.device], list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((max(matrix.shape), min(matrix.shape), matrix.device), []).append(i)
    return list(groups.values())


@torch.no_grad()
def matrix_spectra(matrices: Sequence[Tensor]) -> Tensor:
    """Singular values of matrices of one size, exact, by the smaller side in ``float64``.

    Right down to about 1e-8 of the largest, and never raising: a matrix with NaN or infinity reads NaN. Decompositions
    are batched, and wait for the device.

    Args:
        matrices: Each ``(O, I)`` or ``(I, O)``, not centered; at least one.

    Returns:
        Descending, shape ``(len(matrices), min(O, I))``, ``float64`` (``float32`` on devices without).

    Example:
        >>> matrix_spectra([torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])])
        tensor([[3., 2.]], dtype=torch.float64)
    """
    size = min(matrices[0].shape)
    step = max(BATCH_ELEMENTS // max(size * size, 1), 1)
    parts = []
    for start in range(0, len(matrices), step):
        grams = torch.stack([_gram(matrix) for matrix in matrices[start : start + step]])
        parts.append(eigenvalues(grams))
    return safe_sqrt(torch.cat(parts))


@full_precision
def _gram(matrix: Tensor) -> Tensor:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide.to(accumulation_dtype(matrix.device))
    return wide @ wide.T
