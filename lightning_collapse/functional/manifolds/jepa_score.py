"""JEPA-SCORE: how dense the data is where an input lies, as a joint embedding has learned it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

ACROSS_SAMPLES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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
        >>> linear = nn.Linear(3, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]]))
        >>> jepa_score(linear, torch.ones(2, 3)).round(decimals=5)
        tensor([0., 0.])
    """
    for name, module in model.named_modules():
        if isinstance(module, ACROSS_SAMPLES) and (module.training or module.running_mean is None):
            raise ValueError(
                f"`model` of `jepa_score` must treat samples one by one, but {type(module).__name__} {name!r} uses the"
                " statistics of the batch. Call `model.eval()` first, or replace the layer."
            )
    state = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def embed(sample: Tensor) -> Tensor:
        output: Tensor = functional_call(model, state, (sample.unsqueeze(0),))
        return output.flatten()

    def score(sample: Tensor) -> Tensor:
        jacobian = jacrev(embed)(sample).flatten(1)
        finite = jacobian.isfinite().all()
        safe = torch.where(finite, jacobian, 0.0).to(torch.promote_types(jacobian.dtype, torch.float32))
        return torch.where(finite, torch.linalg.svdvals(safe).clamp_min(floor).log().sum(), torch.nan)

    with torch.autocast(x.device.type, enabled=False):
        scores: Tensor = vmap(score, chunk_size=chunk_size)(x.detach())
    return scores
