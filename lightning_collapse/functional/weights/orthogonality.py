"""Orthogonality defect: how far a weight matrix is from keeping lengths."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.registry import register_measure


@register_measure(
    kind="weights",
    scale_free=False,
    range="0 to infinity",
    collapsed="growing",
    source="Bansal et al., NeurIPS 2018, arXiv 1810.09102",
    flops=lambda rows, columns: 4.0 * rows * columns * min(rows, columns),
)
@full_precision
def orthogonality_defect(weight: Tensor) -> Tensor:
    r"""Distance of the smaller Gram matrix of a weight from the identity, as a root mean square over its rows.

    .. math:: \|G - I\|_F / \sqrt{k}, \quad G = W W^\top \text{ or } W^\top W, \quad k = \min(O, I)

    That of soft orthogonality, per row. The larger Gram matrix of a matrix that is not square cannot be the identity.

    Args:
        weight: Shape ``(O, I)``; more dimensions are flattened into the second, as of a convolution.

    Returns:
        0-dimensional, 0 (orthonormal rows or columns: all singular values are 1), 1 for a matrix of zeros, or more; NaN
        for an empty one.

    References:
        Bansal et al., *Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?*, NeurIPS 2018.
        https://arxiv.org/abs/1810.09102

    Example:
        >>> orthogonality_defect(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))  # (1 - 1, 4 - 1)
        tensor(2.1213)
    """
    wide = weight.flatten(1).to(accumulation_dtype(weight.device))
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    excess = wide @ wide.T - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return excess.square().sum().div(len(wide) or torch.nan).sqrt().to(weight.dtype)
