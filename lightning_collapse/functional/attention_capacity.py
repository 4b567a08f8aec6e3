"""Attention capacity: how many keys a head uses, whether it can single one out, and how many directions keys fill."""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision

SINK = 0.3
"""Mean weight of the first key above which a head has a sink there (Gu et al., 2025)."""


class EffectiveKeys(NamedTuple):
    """How many keys a row uses; both between 1 and the number of keys.

    Attributes:
        shannon: Exponential of the entropy, ``N_1``.
        simpson: One over the sum of squares, ``N_2``; never above ``shannon``.
    """

    shannon: Tensor
    simpson: Tensor


@full_precision
def effective_keys(weights: Tensor) -> EffectiveKeys:
    r"""Effective number of keys of attention rows: :math:`N_1 = e^{\mathcal{H}(p)}` and :math:`N_2 = 1 / \sum p^2`.

    Of independent Gaussian logits with standard deviation :math:`s` and many keys, :math:`N_2 / T` is
    :math:`e^{-s^2}` and :math:`N_1 / T` is :math:`e^{-s^2 / 2}`.

    Args:
        weights: Attention weights, shape ``(..., S)``, that sum to one.

    Returns:
        Each of shape ``(...)``, between 1 and ``S``.

    References:
        Hill, *Diversity and evenness*, Ecology 1973.

    Example:
        >>> effective_keys(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).simpson
        tensor([2., 1.])
    """
    entropy = -torch.xlogy(weights, weights).sum(dim=-1)
    return EffectiveKeys(entropy.exp(), 1 / weights.square().sum(dim=-1))


def retrieval_lead(keys: int, error: float = 0.1) -> float:
    r"""By how much one logit must lead all others, taken equal, for its key to get a weight of ``1 - error``.

    .. math:: \log \frac{(T - 1)(1 - \epsilon)}{\epsilon}

    Args:
        keys: Number :math:`T` of keys, at least 2.
        error: Weight :math:`\epsilon` left to the others, between 0 and 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(retrieval_lead(1024), 2)
        9.13
    """
    if keys < 2 or not 0 < error < 1:
        raise ValueError(f"`keys` must be at least 2 and `error` between 0 and 1, got {keys} and {error}.")
    return log((keys - 1) * (1 - error) / error)


@full_precision
def logit_lead(weights: Tensor, visible: Tensor, error: float = 0.1) -> Tensor:
    r"""How far the largest logit of a row leads the others, over what retrieval takes, see :func:`retrieval_lead`.

    The lead is over the logarithm of the mean exponential of the others, :math:`\log \frac{(T - 1) p}{1 - p}` with the
    largest weight :math:`p`: 1 or more if, and only if, :math:`p \ge 1 - \epsilon`. A head that stays below in every
    row mixes keys and selects none.

    Args:
        weights: Attention weights, shape ``(..., S)``, that sum to one.
        visible: Number of keys each row sees, shape ``(...)``.
        error: Weight :math:`\epsilon` left to the others.

    Returns:
        Shape ``(...)``, 0 for uniform rows; NaN for rows that see fewer than two keys.

    Example:
        >>> logit_lead(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([2.0, 2.0]))
        tensor([0.0000, 1.0000])
    """
    largest = weights.amax(dim=-1)
    others = (visible - 1).where(visible > 1, torch.nan)
    rest = (1 - largest).clamp_min(torch.finfo(weights.dtype).eps)
    return ((others * largest / rest).log() / (others * (1 - error) / error).log()).clamp_min(0)


@full_precision
def sink_weight(weights: Tensor, visible: Tensor) -> Tensor:
    r"""Mean weight that the queries of a sequence give to the first key that any of them sees.

    Above :data:`SINK` the head has an attention sink there, for this sequence. Most heads of language models have one:
    it is how a head does nothing. Of few keys uniform attention gives as much: at 8, causal, 0.34.

    Args:
        weights: Attention weights, shape ``(..., L, S)``, rows that sum to one.
        visible: Boolean, broadcasts to the weights: keys that each query sees; no key for queries that do not count.

    Returns:
        Shape ``(...)``, between 0 and 1; NaN where no key is seen.

    References:
        Gu et al., *When Attention Sink Emerges in Language Models*, ICLR 2025. https://arxiv.org/abs/2410.10781

    Example:
        >>> everything = torch.ones(2, 2, dtype=torch.bool)
        >>> sink_weight(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), everything)
        tensor(0.7500)
    """
    seen = visible.expand(weights.shape)
    first = seen.any(dim=-2).to(torch.uint8).argmax(dim=-1)[..., None, None].expand(*weights.shape[:-1], 1)
    sees = seen.gather(-1, first).squeeze(-1)
    total = (weights.gather(-1, first).squeeze(-1) * sees).sum(dim=-1)
    return total / sees.sum(dim=-1).to(total).where(sees.any(dim=-1), torch.nan)


@full_precision
def key_participation(key: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""Participation ratio of the keys of a head, over their width: how many directions they fill.

    .. math:: \frac{(\operatorname{tr} G)^2}{d_k \operatorname{tr} G^2}, \quad G = K^\top K

    A head whose keys fill few directions cannot tell them apart, however large its logits are. Not centered: a common
    key shifts all logits of a row alike.

    Args:
        key: Shape ``(..., S, d_k)``.
        counts: Boolean, shape ``(..., S)``: keys that count; all by default.

    Returns:
        Shape ``(...)``, between ``1 / d_k`` and 1, see :func:`key_participation_null`; NaN where all keys are zero.

    Example:
        >>> key_participation(torch.eye(4)), key_participation(torch.ones(4, 4))
        (tensor(1.), tensor(0.2500))
    """
    width = key.shape[-1]
    key = key if counts is None else key * counts.unsqueeze(-1)
    gram = key.mT @ key if key.shape[-2] > width else key @ key.mT  # the smaller side
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    square = gram.square().sum(dim=(-2, -1))
    return (trace / square.sqrt()).square().where(square > 0, torch.nan) / width


def key_participation_null(keys: int, width: int) -> float:
    """What :func:`key_participation` reads of Gaussian keys: ``1 / (1 + d_k / T)``.

    Example:
        >>> round(key_participation_null(1024, 64), 3)
        0.941
    """
    return 1 / (1 + width / keys)
