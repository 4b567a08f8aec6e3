"""Row space: orthonormal bases of what rows span, whatever the numbers."""

import torch
from torch import Tensor


def row_space(matrix: Tensor, resolution: float = 0.0) -> Tensor:
    """Orthonormal basis of the space that the rows of a matrix span; zero columns where its rank is not full.

    A matrix with NaN or infinity, and one on which the solver does not converge, yields NaN.

    Args:
        matrix: Shape ``(R, D)``, ``float32`` or ``float64``.
        resolution: Singular values up to this share of the largest, times the longer side, are zero; at least the
            resolution of the dtype.

    Returns:
        Shape ``(D, min(R, D))``.

    Example:
        >>> row_space(torch.tensor([[3.0, 0.0], [6.0, 0.0]])).abs()
        tensor([[1., 0.],
                [0., 0.]])
    """
    finite = matrix.sum().isfinite()
    try:
        _, values, vectors = torch.linalg.svd(torch.where(finite, matrix, 0.0), full_matrices=False)
    except torch.linalg.LinAlgError:
        return matrix.new_full((matrix.shape[1], min(matrix.shape)), torch.nan)
    resolution = max(matrix.shape) * max(resolution, torch.finfo(matrix.dtype).eps)
    kept = (values > resolution * values[:1]).unsqueeze(-1)
    return torch.where(finite, torch.where(kept, vectors, 0.0), torch.nan).T
