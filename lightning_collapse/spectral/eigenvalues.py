"""Eigenvalues of Gram matrices, on every device, whatever the numbers."""

import torch
from torch import Tensor


def eigenvalues(gram: Tensor) -> Tensor:
    """Eigenvalues of symmetric positive semi-definite matrices, descending and not negative.

    A matrix with NaN or infinity, and one on which no solver converges (CUDA's can fail on exactly the rank-deficient
    matrices of a collapse, https://github.com/pytorch/pytorch/issues/94772), yields NaN instead of an error. Waits
    for the device: decompositions do.

    Args:
        gram: Shape ``(..., K, K)``, ``float32`` or ``float64``.

    Returns:
        Shape ``(..., K)``.

    Example:
        >>> eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor([3., 1.])
    """
    finite = gram.sum(dim=(-2, -1)).isfinite()  # a sum is finite if and only if its terms are
    safe = torch.where(finite[..., None, None], gram, 0.0)
    try:
        values = torch.linalg.eigvalsh(safe)
    except torch.linalg.LinAlgError:
        values = (
            torch.stack([_second_try(matrix) for matrix in safe.flatten(0, -3)]) if safe.ndim > 2 else _second_try(safe)
        )
        values = values.view(*safe.shape[:-1])
    return torch.where(finite[..., None], values.flip(-1).clamp_min(0), torch.nan)


def eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not negative, and eigenvectors of one symmetric positive semi-definite matrix.

    NaN instead of an error, as in :func:`eigenvalues`. Waits for the device.

    Args:
        gram: Shape ``(K, K)``, ``float32`` or ``float64``.

    Returns:
        Eigenvalues ``(K,)`` and, in the columns of ``(K, K)``, orthonormal eigenvectors.

    Example:
        >>> values, vectors = eigenvectors(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> values, vectors.abs()
        (tensor([3., 1.]), tensor([[1., 0.],
                [0., 1.]]))
    """
    finite = gram.sum().isfinite()
    safe = torch.where(finite, gram, 0.0)
    try:
        values, vectors = torch.linalg.eigh(safe)
    except torch.linalg.LinAlgError:
        values, vectors = (part.to(gram) for part in _second_pair(safe))
    return torch.where(finite, values.flip(-1).clamp_min(0), torch.nan), vectors.flip(-1)


def safe_sqrt(values: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero instead of infinite."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), torch.where(values.isnan(), values, 0.0))


def _second_try(matrix: Tensor) -> Tensor:
    try:
        values = torch.linalg.eigvalsh(_jittered(matrix))
    except torch.linalg.LinAlgError:
        values = torch.full((len(matrix),), torch.nan, dtype=torch.float64)
    on_device: Tensor = values.to(matrix)
    return on_device


def _second_pair(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(_jittered(matrix))
    except torch.linalg.LinAlgError:
        values = torch.full((len(matrix),), torch.nan, dtype=torch.float64)
        vectors = torch.eye(len(matrix), dtype=torch.float64)
    return values, vectors


def _jittered(matrix: Tensor) -> Tensor:
    """On the host in double precision; a little of the trace on the diagonal separates what made the solver fail."""
    jitter = 1e-14 * matrix.trace().abs().cpu().double() / max(len(matrix), 1)
    return matrix.cpu().double() + jitter * torch.eye(len(matrix), dtype=torch.float64)
