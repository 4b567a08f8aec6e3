"""Token dynamics of selective state spaces: whether a layer draws all tokens to zero, or apart."""

import torch
from torch import Tensor

from lightning_collapse.functional.states.eigenmodes import eigenmodes


def token_divergence(read: Tensor, write: Tensor) -> Tensor:
    r"""Largest real part of an eigenvalue of :math:`S_C^\top S_B`, over the largest modulus.

    In the limit of many layers tokens converge to zero, as :math:`1/\sqrt t`, where all eigenvalues are negative, and
    diverge where one is positive; the first is reported to hurt. Proven for tokens of one dimension, and for a layer of
    nothing but this; gates, skips and norms are not in it. The eigenvalues that are not zero for want of rank are those
    of the small matrix :math:`S_B S_C^\top`.

    Args:
        read: Projection :math:`S_C` that makes ``C`` of a token, shape ``(n, D)``.
        write: Projection :math:`S_B` that makes ``B``, the same shape.

    Returns:
        0-dimensional: below 0 (all tokens converge) or above (they diverge), -1 to 1; 0 for zeros.

    Raises:
        ValueError: If the shapes differ.

    References:
        Vo et al., *Demystifying the Token Dynamics of Deep Selective State Space Models*, ICLR 2025.
        https://arxiv.org/abs/2410.03292

    Example:
        >>> token_divergence(torch.eye(2, 4), -torch.eye(2, 4)), token_divergence(torch.eye(2), torch.eye(2))
        (tensor(-1., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    if read.ndim != 2 or read.shape != write.shape:
        raise ValueError(f"`read` and `write` must be (n, D) alike, got {tuple(read.shape)}, {tuple(write.shape)}.")
    values = eigenmodes(write.double() @ read.double().T if read.device.type != "mps" else write @ read.T).values
    largest = values.abs().amax()
    return torch.where(largest > 0, values.real.amax() / largest, 0.0 * largest)
