"""Spectral entropy: how evenly a spectrum is filled, as the optimizer literature reads it from weights and updates."""

import torch
from torch import Tensor

from lightning_collapse.functional.rank import eigenvalue_effective_rank
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.spectrum import Spectrum, values_of
from lightning_collapse.utilities.registry import register_measure


@register_measure(
    record=True,
    range="0 to 1",
    collapsed="near 0",
    source="normalized SVD entropy of arXiv 2509.26030",
    sketchable=False,
)
@full_precision
def svd_entropy(singular_values: Tensor | Spectrum) -> Tensor:
    r"""Entropy of the normalized squared singular values, as a share of what it can be.

    .. math:: -\frac{1}{\log n} \sum_i q_i \log q_i, \quad q_i = \sigma_i^2 / \|\sigma\|_2^2

    The logarithm of :func:`~lightning_collapse.functional.eigenvalue_effective_rank` (the "eRank" of the same paper) by
    that of the number of singular values: so matrices of different shapes compare.

    Args:
        singular_values: Non-negative, shape ``(..., K)`` with ``n = K``, or a ``Spectrum`` record of centered features,
            where ``n = min(count - 1, dim)``.

    Returns:
        Shape ``(...)``, between 0 (one direction, or nothing) and 1 (all singular values equal); 0 for ``n = 1``.

    References:
        *Muon Outperforms Adam in Tail-End Associative Memory Learning*, 2025. https://arxiv.org/abs/2509.26030
        (the formula as other code that follows the paper has it; not compared with the paper itself).

    Example:
        >>> svd_entropy(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    rank = eigenvalue_effective_rank(singular_values)
    return rank.clamp_min(1).log() / _count(singular_values).clamp_min(2).log()


@register_measure(
    record=True,
    range="1 to infinity",
    collapsed="large",
    source="'Q75/25' of the Muon literature, singular values",
    sketchable=False,
)
@full_precision
def quartile_ratio(singular_values: Tensor | Spectrum) -> Tensor:
    r"""Third over first quartile of the singular values, :math:`Q_{75}(\sigma) / Q_{25}(\sigma)`.

    Quantiles by linear interpolation between order statistics (type 7 of Hyndman & Fan, the default of NumPy and
    torch), over the ``n`` singular values there are. Accounts of the paper differ on whether singular values or
    eigenvalues are meant; :func:`eigenvalue_quartile_ratio` is the other reading. Without interpolation it would be the
    square of this.

    Args:
        singular_values: Descending, shape ``(..., K)`` with ``n = K``, or a ``Spectrum`` record of centered features,
            where ``n = min(count - 1, dim)``.

    Returns:
        Shape ``(...)``, at least 1 (all equal); infinite if the first quartile is zero, 0 if the third is zero too.

    References:
        *Muon Outperforms Adam in Tail-End Associative Memory Learning*, 2025. https://arxiv.org/abs/2509.26030

    Example:
        >>> quartile_ratio(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
        tensor(2.)
    """
    return _quartile_ratio(values_of(singular_values), _count(singular_values))


@register_measure(
    record=True,
    range="1 to infinity",
    collapsed="large",
    source="'Q75/25' of the Muon literature, eigenvalues",
    sketchable=False,
)
@full_precision
def eigenvalue_quartile_ratio(singular_values: Tensor | Spectrum) -> Tensor:
    r"""Third over first quartile of the squared singular values, :math:`Q_{75}(\sigma^2) / Q_{25}(\sigma^2)`.

    The other reading of :func:`quartile_ratio`, with the same quantiles.

    Args:
        singular_values: As in :func:`quartile_ratio`.

    Returns:
        Shape ``(...)``, at least 1 (all equal); infinite if the first quartile is zero, 0 if the third is zero too.

    Example:
        >>> eigenvalue_quartile_ratio(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
        tensor(4.)
    """
    values = values_of(singular_values)
    relative = values / values[..., :1].clamp_min(torch.finfo(values.dtype).tiny)
    return _quartile_ratio(relative.square(), _count(singular_values))


def _count(singular_values: Tensor | Spectrum) -> Tensor:
    """How many singular values there can be; of ``n`` centered rows ``n - 1``."""
    values = values_of(singular_values)
    if isinstance(singular_values, Spectrum):
        return (singular_values.count - 1).clamp(1, values.shape[-1]).to(values.dtype)
    return values.new_full((), values.shape[-1])


def _quartile_ratio(values: Tensor, count: Tensor) -> Tensor:
    upper, lower = (_at(values, (count - 1) * share) for share in (0.25, 0.75))
    positive = lower > 0
    ratio = upper / torch.where(positive, lower, 1.0)
    ratio = torch.where(positive, ratio, torch.where(upper > 0, torch.inf, torch.zeros_like(upper)))
    return torch.where(values.isnan().any(dim=-1), torch.nan, ratio)


def _at(values: Tensor, position: Tensor) -> Tensor:
    """Interpolate descending values at a fractional index."""
    position = position.expand(values.shape[:-1])
    below = position.floor()
    first = values.gather(-1, below.long().unsqueeze(-1)).squeeze(-1)
    second = values.gather(-1, position.ceil().long().unsqueeze(-1)).squeeze(-1)
    return first + (position - below) * (second - first)
