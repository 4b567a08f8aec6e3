"""Attention diversity: whether heads, and whether queries, look at different keys."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def head_cosine(weights: Tensor) -> Tensor:
    r"""Mean cosine between the attention rows of two heads, over all pairs of heads.

    .. math:: \frac{2}{H (H - 1)} \sum_{h < h'} \frac{p_h \cdot p_{h'}}{\|p_h\| \|p_{h'}\|}

    Of rows, not of flattened maps: these hide that sharp heads differ. Short rows are alike whatever the heads do, so
    read rows with 64 keys or more, and compare with :func:`head_cosine_null`.

    Args:
        weights: Attention weights, shape ``(..., H, L, S)``, rows of non-negative numbers.

    Returns:
        Shape ``(..., L)``, between 0 (no key is shared) and 1 (all heads alike); NaN for one head.

    Example:
        >>> head_cosine(torch.eye(2).unsqueeze(1)), head_cosine(torch.ones(2, 1, 4))
        (tensor([0.]), tensor([1.]))
    """
    heads = weights.shape[-3]
    units = torch.nn.functional.normalize(weights, dim=-1, eps=torch.finfo(weights.dtype).tiny)
    together = units.sum(dim=-3).square().sum(dim=-1)
    return _over_pairs(together - units.square().sum(dim=-1).sum(dim=-2), heads)


@full_precision
def head_cosine_null(spread: Tensor) -> Tensor:
    r"""What :func:`head_cosine` reads of heads with independent Gaussian logits, and all keys visible.

    .. math:: \frac{2}{H (H - 1)} \sum_{h < h'} e^{-(s_h^2 + s_{h'}^2) / 2}

    For long rows; of heads alike it is :math:`e^{-s^2}`. Where the standard deviation :math:`s` is above 2 a row has
    few keys that matter, and the value is higher than this.

    Args:
        spread: Standard deviation :math:`s` of the logits of a row, shape ``(..., H, L)``.

    Returns:
        Shape ``(..., L)``, between 0 and 1; NaN for one head.

    Example:
        >>> head_cosine_null(torch.ones(4, 1))
        tensor([0.3679])
    """
    overlap = (-spread.square() / 2).exp()
    return _over_pairs(overlap.sum(dim=-2).square() - overlap.square().sum(dim=-2), spread.shape[-2])


@full_precision
def head_divergence(weights: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence between the attention rows of all heads, over its maximum.

    .. math:: \frac{1}{\log H} \Big(\mathcal{H}\big(\tfrac1H \sum_h p_h\big) - \tfrac1H \sum_h \mathcal{H}(p_h)\Big)

    Args:
        weights: Attention weights, shape ``(..., H, L, S)``, rows that sum to one.

    Returns:
        Shape ``(..., L)``, between 0 (all heads alike) and 1 (no key is shared); NaN for one head.

    References:
        Lin, *Divergence measures based on the Shannon entropy*, IEEE Transactions on Information Theory 1991.

    Example:
        >>> head_divergence(torch.eye(2).unsqueeze(1)), head_divergence(torch.ones(2, 1, 2) / 2)
        (tensor([1.]), tensor([0.]))
    """
    heads = weights.shape[-3]
    gained = _entropy(weights.mean(dim=-3)) - _entropy(weights).mean(dim=-2)
    scale = torch.tensor(heads, dtype=gained.dtype, device=gained.device).log()
    return (gained / scale).clamp(0, 1)  # rounding; 0 / 0 for one head


@full_precision
def query_nmi(weights: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""Normalized mutual information of queries and keys: whether different queries look at different keys.

    .. math:: \frac{I(q; k)}{\sqrt{\mathcal{H}(q)\, \mathcal{H}(k)}}, \quad p(q) = \tfrac1T, \quad
        p(k) = \tfrac1T \sum_q p(k \mid q)

    Near 0 all queries look alike, which is how attention of contrastive image models collapses in later layers. Under
    a causal mask even uniform attention is above 0, see :func:`query_nmi_null`: subtract it. Of some queries only it
    is the same quantity of these; compare with the null of the same.

    Args:
        weights: Attention weights, shape ``(..., L, S)``, rows that sum to one.
        counts: Boolean, broadcasts to ``(..., L)``: queries that count; all by default.

    Returns:
        Shape ``(...)``, between 0 and 1; 0 where all queries give one key all their weight, NaN for fewer than two
        queries.

    References:
        Park et al., *What Do Self-Supervised Vision Transformers Learn?*, ICLR 2023. https://arxiv.org/abs/2305.00729

    Example:
        >>> query_nmi(torch.eye(4)), query_nmi(torch.ones(4, 4) / 4)
        (tensor(1.), tensor(0.))
    """
    given = torch.ones_like(weights[..., 0]) if counts is None else counts.to(weights).expand(weights.shape[:-1])
    number = given.sum(dim=-1)
    of_keys = _entropy((weights * given.unsqueeze(-1)).sum(dim=-2) / number.unsqueeze(-1))
    of_rows = (_entropy(weights) * given).sum(dim=-1) / number
    scale = (number.log() * of_keys).sqrt()
    nmi = ((of_keys - of_rows) / scale).clamp(0, 1)
    return torch.where(of_keys > 0, nmi, 0.0).where(number > 1, torch.nan)


@full_precision
def query_nmi_null(visible: Tensor, counts: Tensor | None = None) -> Tensor:
    """What :func:`query_nmi` reads of uniform attention under the same mask, for the same queries.

    Args:
        visible: Boolean, shape ``(..., L, S)``: keys that each query sees.
        counts: As in :func:`query_nmi`.

    Returns:
        Shape ``(...)``, between 0 and 1: 0 where all queries see the same keys; for all queries of a causal mask 0.139,
        0.121 and 0.086 of 64, 128 and 1024 keys.

    Example:
        >>> query_nmi_null(torch.ones(128, 128, dtype=torch.bool).tril())
        tensor(0.1208)
    """
    shown = visible.to(torch.get_default_dtype())
    return query_nmi(shown / shown.sum(dim=-1, keepdim=True).clamp_min(1), counts)


def _entropy(weights: Tensor) -> Tensor:
    return -torch.xlogy(weights, weights).sum(dim=-1)


def _over_pairs(twice: Tensor, heads: int) -> Tensor:
    """Twice a sum over pairs of heads, as a mean; NaN where there is no pair."""
    return twice / (heads * (heads - 1)) if heads > 1 else torch.full_like(twice, torch.nan)
