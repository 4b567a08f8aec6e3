"""JEPA-SCORE: how dense the data is where an input lies, as a joint embedding has learned it."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_collapse.functional.manifolds.jacobian import jacobian_spectra


def jepa_score(model: nn.Module, x: Tensor, floor: float = 1e-6, chunk_size: int = 1) -> Tensor:
    r"""Sum of the logarithms of the singular values of each input's own Jacobian.

    .. math:: \sum_k \log \max(\sigma_k(J_f(x)), 10^{-6})

    Higher is denser, where embeddings are Gaussian. Each missing direction adds -13.8, so only scores of one width
    compare. No reliable detector of strangers: an independent evaluation has it below chance for some encoders.

    Args:
        model: Takes ``(N, ...)``, returns ``(N, ...)``; left as it is. What draws random numbers must be in eval mode.
        x: Inputs, shape ``(N, ...)``, floating-point.
        floor: The least singular value.
        chunk_size: Inputs at a time: the memory is that of so many Jacobians, each a backward pass per output.

    Returns:
        Shape ``(N,)``, at least ``float32``, without a graph; NaN for an input with NaN.

    Raises:
        ValueError: If a batch normalization uses the statistics of the batch: samples then have no Jacobian of their
            own.

    References:
        Balestriero et al., *Gaussian Embeddings: How JEPAs Secretly Learn Your Data Density*, 2025.
        https://arxiv.org/abs/2510.05949

    Example:
        >>> import torch
        >>> linear = nn.Linear(3, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]]))
        >>> jepa_score(linear, torch.ones(2, 3)).round(decimals=5)
        tensor([0., 0.])
    """
    return jacobian_spectra(model, x, chunk_size).clamp_min(floor).log().sum(dim=-1)
