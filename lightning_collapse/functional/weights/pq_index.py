"""PQ index: how sparse a set of numbers is, and how many of them carry it."""

from math import nan

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.registry import register_measure


@register_measure(
    kind="weights",
    range="0 to 1 - 1 / (O I)",
    collapsed="rising: few weights carry the layer",
    source="Diao et al., ICLR 2023, arXiv 2302.05601",
    null=lambda rows, columns: 0.15277 if rows * columns > 64 else nan,
)
@full_precision
def pq_index(values: Tensor, p: float = 0.5, q: float = 1.0) -> Tensor:
    r"""PQ Index: sparsity of weights by the ratio of two norms.

    .. math:: 1 - d^{1/q - 1/p}\, \|w\|_p / \|w\|_q

    At ``(0.5, 1)``, the authors' first setting and the default here, Gaussian numbers read 0.1528 and Laplacian ones
    0.2146; at ``(1, 2)``, their second, :math:`1 - \sqrt{2 / \pi} = 0.2021` and 0.2929.

    Args:
        values: Any shape; all its ``d`` elements count, zeros too: leave out those that are pruned for good.
        p: The smaller exponent.
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
        >>> one = torch.nn.functional.one_hot(torch.tensor(3), 100).float()
        >>> pq_index(one), pq_index(one, p=1.0, q=2.0)
        (tensor(0.9900), tensor(0.9000))
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


def sap_keep_count(
    values: Tensor, p: float = 0.5, q: float = 1.0, eta: float = 0.0, gamma: float = 1.0, beta: float = 0.9
) -> Tensor:
    r"""How many weights one round of sparsity-informed adaptive pruning (SAP) keeps: the largest so many.

    .. math:: d - \lfloor d \min(\gamma (1 - m / d), \beta) \rfloor, \quad
        m = \lceil d\, (1 + \eta)^{q / (p - q)} (1 - I_{p,q})^{pq / (q - p)} \rceil

    Args:
        values: The ``d`` weights that are left, any shape; what earlier rounds have pruned must not be among them.
        p: The smaller exponent of :func:`pq_index`.
        q: The larger exponent.
        eta: How much may be lost, relative to what ``m`` weights must hold.
        gamma: Factor of the share that is pruned.
        beta: The largest share that is pruned in a round.

    Returns:
        0-dimensional ``int64``, 0 to ``d``; ``d`` where the index is NaN. At the default ``p`` and ``q`` the share
        that goes is the index itself.

    Raises:
        ValueError: If not ``0 < p < q``, or ``eta`` or ``gamma`` is negative, or ``beta`` is not between 0 and 1.

    References:
        Diao et al., ICLR 2023, https://arxiv.org/abs/2302.05601; defaults are those of the authors' code.

    Example:
        >>> sap_keep_count(torch.nn.functional.one_hot(torch.tensor(3), 100).float())
        tensor(10)
    """
    for name, value, top in (("eta", eta, torch.inf), ("gamma", gamma, torch.inf), ("beta", beta, 1.0)):
        if not 0 <= value <= top:
            raise ValueError(f"`{name}` must be from 0 to {top:g}, got {value}.")
    count = values.numel()
    index = pq_index(values.to(accumulation_dtype(values.device)), p, q)
    kept = (count * (1 + eta) ** (q / (p - q)) * (1 - index) ** (p * q / (q - p))).ceil()
    pruned = (count * (gamma * (1 - kept / max(count, 1))).clamp(0, beta)).floor()
    return count - torch.where(index.isnan(), 0.0, pruned).long()
