"""Attention entropy: how sharply each head looks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.attention_rows import EntropyRows, entropies_of_call, rows_of_call
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.attention_calls import AttentionCall, sample

LOGIT_ROWS = 8  # costs a twentieth of the pass over all rows


class HeadEntropy(NamedTuple):
    """How sharply each head looks; every field has shape ``(H,)``.

    A row is one query of one sequence; it is normalized by the logarithm of the number of keys it sees.

    Attributes:
        entropy: Mean entropy in nats, over rows that see a key.
        normalized: Mean of entropy over its maximum, between 0 (collapsed: one key has all the weight) and 1
            (overloaded: uniform), over rows that see two keys or more; NaN if there is none.
        standard_error: Of ``normalized``, for having read some rows only; 0 where all were read.
        lowest: The smallest normalized entropy of a row.
        max_logit: Largest logit.
        bound: Mean of :func:`entropy_bound` over its maximum, between 0 and 1; of the same rows never above
            ``normalized``.
        rows: Number of rows behind ``normalized``.
    """

    entropy: Tensor
    normalized: Tensor
    standard_error: Tensor
    lowest: Tensor
    max_logit: Tensor
    bound: Tensor
    rows: Tensor


@torch.no_grad()
def attention_entropy(
    query: Tensor,
    key: Tensor,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    query_mask: Tensor | None = None,
    rows: int | None = None,
) -> HeadEntropy:
    r"""Entropy of attention weights, exact or from a few rows, without the ``L x S`` matrix of them.

    .. math:: H_i = -\sum_j p_{ij} \log p_{ij} = \log \sum_j e^{s_{ij}} - \sum_j p_{ij} s_{ij},
        \quad s_{ij} = c\, q_i \cdot k_j

    Low entropy goes with oscillation and divergence of training (entropy collapse [1]); heads near the maximum are
    under-used (entropic overload [2]). Entropies are averaged, and not the weights: entropy is concave, and the map
    averaged over heads or queries looks healthy when each is collapsed. Computed in ``float32`` at least, with autocast
    off: in ``bfloat16`` fused attention reads peaked heads a tenth too low. The exact form costs one pass of fused
    attention; with a mask that is added up to 1.4, and 1.7 with one of full shape ``(B, H, L, S)``. No gradient.

    Args:
        query: Shape ``(B, H, L, E)``, any floating dtype.
        key: Shape ``(B, H, S, E)``; or ``(B, H_kv, S, E)`` with ``H`` a multiple of ``H_kv`` (grouped queries).
            A learned sink, an extra logit in the softmax, is no key and does not belong here: what is measured is how
            the weight that keys get is shared among them. A token that attracts attention, such as the first one, is.
        is_causal: Query ``i`` sees keys ``0..i``, as in ``F.scaled_dot_product_attention``.
        attn_mask: Boolean, true where a key is visible, or added to the logits; broadcasts to ``(B, H, L, S)``. A key
            padding mask is one of shape ``(B, 1, 1, S)``. Keys whose bias is 5000 or more below the row's largest, or
            below zero, are hidden: ``-inf``, ``-1e9``, ``-1e4`` and the lowest number of any dtype do the same.
        scale: Factor on ``query @ key``; ``None`` for ``1 / sqrt(E)``.
        query_mask: Boolean, shape ``(B, L)``: queries that count; padding should not.
        rows: Read this many queries of every sequence, one from each of as many equal strata, always the same ones;
            ``None`` reads all.

    Returns:
        One value per query head. ``max_logit`` and ``bound`` are of the rows that were read; with ``rows=None``, since
        the fused kernel shows no logits, of 8 of each sequence. NaN in a head's rows makes its values NaN.

    Raises:
        ValueError: If shapes do not fit, both ``is_causal`` and ``attn_mask`` are given, or ``rows`` is not positive.

    References:
        [1] Zhai et al., *Stabilizing Transformer Training by Preventing Attention Entropy Collapse*, ICML 2023.
        https://arxiv.org/abs/2303.06296
        [2] Jha & Reagen, *Entropy-Guided Attention for Private LLMs*, 2025. https://arxiv.org/abs/2501.03489

    Example:
        >>> keys = torch.eye(4).reshape(1, 1, 4, 4)
        >>> same, one = torch.zeros(1, 1, 1, 4), torch.tensor([[[[1000.0, 0.0, 0.0, 0.0]]]])
        >>> attention_entropy(same, keys).normalized, attention_entropy(one, keys).normalized
        (tensor([1.]), tensor([0.]))
    """
    check_attention(query, key, is_causal, attn_mask, query_mask, rows)
    call = AttentionCall(query, key, is_causal, attn_mask, scale, query_mask)
    length = query.shape[2]
    few = rows_of_call(sample(call, LOGIT_ROWS if rows is None else rows))
    if rows is None and length > few.entropy.shape[2]:
        entropy, visible = entropies_of_call(call)
    else:
        entropy, visible = few.entropy, few.visible
    normalized, counts = normalize(entropy, visible)
    count = counts.sum(dim=(0, 2))
    seen = visible > 0
    bound, bounded = normalize(entropy_bound(few.logit_norm, few.visible), few.visible)
    return HeadEntropy(
        entropy.where(seen, 0.0).sum(dim=(0, 2)) / seen.sum(dim=(0, 2)),
        normalized.sum(dim=(0, 2)) / count,
        _standard_error(normalized, counts, length),
        _nan_if_none(normalized.where(counts, torch.inf).amin(dim=(0, 2)), count),
        _nan_if_none(few.max_logit.where(few.visible > 0, -torch.inf).amax(dim=(0, 2)), count),
        bound.sum(dim=(0, 2)) / bounded.sum(dim=(0, 2)),
        count,
    )


@full_precision
def entropy_bound(logit_norm: Tensor, keys: Tensor) -> Tensor:
    r"""The least entropy that ``keys`` logits of a given spread can have: collapse is possible only below it.

    .. math:: \log\big(1 + (T - 1) \beta\big) + \frac{\sigma \sqrt{T (T - 1)}\, \beta}{1 + (T - 1) \beta}, \quad
        \beta = e^{-\sigma \sqrt{T / (T - 1)}}

    Attained by one logit of :math:`\sigma \sqrt{(T - 1) / T}` and the others :math:`-\sigma / \sqrt{T (T - 1)}`. The
    paper states it with a product of spectral norms for :math:`\sigma`; the norm of the row itself, which is tighter,
    is our choice.

    Args:
        logit_norm: Euclidean norm :math:`\sigma` of the centered logits of a row, any shape.
        keys: Number :math:`T` of logits, at least 2, of the same shape.

    Returns:
        In nats, of the same shape, between 0 and ``log(T)``; NaN for fewer than two keys.

    References:
        Zhai et al., *Stabilizing Transformer Training by Preventing Attention Entropy Collapse*, ICML 2023.
        https://arxiv.org/abs/2303.06296

    Example:
        >>> entropy_bound(torch.tensor([0.0, 3.0, 300.0]), torch.tensor([8.0, 8.0, 8.0]))
        tensor([2.0794, 0.9575, 0.0000])
    """
    others = (keys - 1).where(keys > 1, torch.nan)
    gap = logit_norm * (keys / others).sqrt()
    rest = others * (-gap).exp()
    # sigma sqrt(T (T - 1)) beta = gap (T - 1) beta
    return rest.log1p() + gap * rest / (1 + rest)


def normalize(entropy: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy over its maximum and which rows have one: those that see two keys or more; the others are 0."""
    counts = visible > 1
    return torch.where(counts, entropy / visible.clamp_min(2).log(), 0.0), counts


def entropy_sums(readings: EntropyRows) -> tuple[Tensor, Tensor]:
    """What means over heads are made of, additive over calls and processes; rows with NaN or infinity are left out.

    Returns:
        ``(H, 5)``: rows that count, the sums of their normalized entropy, of its square and of the normalized bound,
        and how many were left out; and ``(H, 2)``, to be joined by the maximum: minus the smallest normalized
        entropy, and the largest logit (minus infinity where there is none).
    """
    normalized, counts = normalize(readings.entropy, readings.visible)
    bound, _ = normalize(entropy_bound(readings.logit_norm, readings.visible), readings.visible)
    finite = counts & normalized.isfinite() & bound.isfinite()
    normalized, bound = normalized.where(finite, 0.0), bound.where(finite, 0.0)
    sums = torch.stack(
        [finite.to(normalized), normalized, normalized.square(), bound, (counts & ~finite).to(normalized)]
    )
    extremes = torch.stack([-normalized, readings.max_logit]).where(finite, -torch.inf)
    return sums.sum(dim=(1, 3)).T, extremes.amax(dim=(1, 3)).T


def _standard_error(values: Tensor, counts: Tensor, length: int) -> Tensor:
    """Of a mean over one row per stratum: from differences of neighbors, in which a trend cancels."""
    drawn = values.shape[2]
    pairs = counts[:, :, 1:] & counts[:, :, :-1]
    squares = torch.where(pairs, values.diff(dim=2).square(), 0.0).sum(dim=(0, 2)) / 2
    variance = squares / pairs.sum(dim=(0, 2)).clamp_min(1)
    error = (variance * (1 - drawn / length) / counts.sum(dim=(0, 2))).sqrt()
    return error.where(pairs.any(dim=2).any(dim=0), torch.nan) if drawn < length else torch.zeros_like(error)


def _nan_if_none(values: Tensor, count: Tensor) -> Tensor:
    return values.where(count > 0, torch.nan)


def check_attention(
    query: Tensor, key: Tensor, is_causal: bool, mask: Tensor | None, query_mask: Tensor | None, rows: int | None
) -> None:
    """Raise what :func:`attention_entropy` raises."""
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            f"`query` and `key` must have shape (B, H, L, E), got {tuple(query.shape)} and {tuple(key.shape)}."
            " Split the heads with `x.unflatten(-1, (heads, -1)).transpose(1, 2)`."
        )
    fits = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    if not fits or not key.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"`key` of shape {tuple(key.shape)} does not fit `query` of shape {tuple(query.shape)}: batch and width"
            " must agree, and the heads of `query` be a multiple of those of `key`."
        )
    if is_causal and mask is not None:
        raise ValueError("Give `is_causal` or `attn_mask`, not both. Let the mask hide later keys.")
    if query_mask is not None and query_mask.shape != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"`query_mask` must have shape {(query.shape[0], query.shape[2])}, got {tuple(query_mask.shape)}."
        )
    if rows is not None and rows < 1:
        raise ValueError(f"`rows` must be at least 1, or None to read all, got {rows}.")
