"""PQ index: how sparse a set of numbers is."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def pq_index(values: Tensor, p: float = 1.0, q: float = 2.0) -> Tensor:
    r"""PQ Index: sparsity of weights by the ratio of two norms.

    .. math:: 1 - d^{1/q - 1/p}\, \|w\|_p / \|w\|_q

    Of Gaussian numbers it reads :math:`1 - \sqrt{2 / \pi} = 0.202` at the default ``p`` and ``q``.

    Args:
        values: Any shape; all its ``d`` elements count.
        p: The smaller exponent. The defaults were not checked against the paper.
        q: The larger exponent.

    Returns:
        0-dimensional, between 0 (all of equal magnitude, or all zero) and ``1 - d ** (1 / q - 1 / p)`` (all but one are
        zero); NaN if one of them is NaN or infinite, or if there are none.

    Raises:
        ValueError: If not ``0 < p < q``.

    References:
        Diao et al., *Pruning Deep Neural Networks from a Sparsity Perspective*, ICLR 2023.
        https://arxiv.org/abs/2302.05601

    Example:
        >>> pq_index(torch.nn.functional.one_hot(torch.tensor(3), 100).float())
        tensor(0.9000)
    """
    if not 0 < p < q:
        raise ValueError(f"`p` and `q` must satisfy 0 < p < q, got {p} and {q}.")
    if not values.numel():
        return values.new_full((), torch.nan)
    size = values.abs()
    largest = size.amax()
    # relative to the largest: powers neither overflow nor vanish
    relative = size / largest.clamp_min(torch.finfo(size.dtype).tiny)
    low, high = relative.pow(p).mean().pow(1 / p), relative.pow(q).mean().pow(1 / q)
    index = (1 - low / torch.where(largest > 0, high, 1.0)).clamp_min(0)
    return torch.where(largest.isfinite(), torch.where(largest > 0, index, 0.0), torch.nan)
