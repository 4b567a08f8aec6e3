"""Attention logits: how large and how small they are, exactly and by a bound that needs no pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.attention_entropy import check_attention
from lightning_collapse.functional.attention_rows import BLOCK, BLOCK_ON_CPU, scale_of
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.attention_calls import AttentionCall, is_visible


class LogitExtremes(NamedTuple):
    """The largest and the smallest logit of each head; every field has shape ``(H,)``.

    Attributes:
        highest: Largest logit over all pairs that are seen; minus infinity if there is none.
        lowest: Smallest one; infinity if there is none.
    """

    highest: Tensor
    lowest: Tensor


@torch.no_grad()
def logit_extremes(
    query: Tensor,
    key: Tensor,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    query_mask: Tensor | None = None,
) -> LogitExtremes:
    r"""Largest and smallest attention logit of every head, over all pairs that a mask lets be seen.

    .. math:: S_{\max} = \max_{i, j} c\, q_i \cdot k_j, \quad S_{\min} = \min_{i, j} c\, q_i \cdot k_j

    Logits are made for a block of keys at a time, so memory does not grow with the square of the length. What a mask
    adds to the logits decides what is seen and is no part of them: a weight scales the product alone. Logits that grow
    without end precede divergence; that of a healthy model levels off. Computed in ``float32`` at least, with autocast
    off, in the time of the product of queries and keys. No gradient.

    Args:
        query: Shape ``(B, H, L, E)``, any floating dtype.
        key: Shape ``(B, H, S, E)``; or ``(B, H_kv, S, E)`` with ``H`` a multiple of ``H_kv`` (grouped queries).
        is_causal: Query ``i`` sees keys ``0..i``.
        attn_mask: As in :func:`~lightning_collapse.functional.attention_entropy`.
        scale: Factor :math:`c`; ``None`` for ``1 / sqrt(E)``.
        query_mask: Boolean, shape ``(B, L)``: queries that count.

    Returns:
        One value per query head, any number; NaN where a logit is.

    Raises:
        ValueError: If shapes do not fit, or both ``is_causal`` and ``attn_mask`` are given.

    References:
        Dehghani et al., *Scaling Vision Transformers to 22 Billion Parameters*, ICML 2023, section 2.
        https://arxiv.org/abs/2302.05442; Kimi Team, *Kimi K2*, 2025. https://arxiv.org/abs/2507.20534

    Example:
        >>> query, key = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[2.0, 1.0], [-1.0, 5.0]]]])
        >>> logit_extremes(query, key, scale=1.0)
        LogitExtremes(highest=tensor([6.]), lowest=tensor([-3.]))
    """
    check_attention(query, key, is_causal, attn_mask, query_mask, None)
    return extremes_of_call(AttentionCall(query, key, is_causal, attn_mask, scale, query_mask))


@full_precision
def logit_bound(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    r"""What no logit of a head exceeds in absolute value, from the lengths of queries and keys alone.

    .. math:: |c|\, \max_b \big(\max_i \|q_{b i}\| \, \max_j \|k_{b j}\|\big) \;\geq\; |S|

    The maximum over sequences :math:`b` is taken of the products, which is never looser than the product of two
    maxima. Two to three times the largest logit as a rule, and as monotone: cheap enough for every step. Masks do not
    change it, and what a mask adds to the logits is not in it.

    Args:
        query: Shape ``(B, H, L, E)``, any floating dtype.
        key: Shape ``(B, H, S, E)``, or ``(B, H_kv, S, E)`` with ``H`` a multiple of ``H_kv``.
        scale: Factor :math:`c`; ``None`` for ``1 / sqrt(E)``.

    Returns:
        Shape ``(H,)``, at least 0.

    References:
        By Cauchy and Schwarz.

    Example:
        >>> query, key = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
        >>> logit_bound(query, key, scale=1.0)
        tensor([6.])
    """
    factor = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    longest = [torch.linalg.vector_norm(x, dim=-1).amax(dim=-1) for x in (query, key)]
    of_keys = longest[1].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    bound: Tensor = (longest[0] * of_keys).amax(dim=0) * factor
    return bound


def extremes_of_call(call: AttentionCall) -> LogitExtremes:
    """:func:`logit_extremes` of a call whose shapes fit."""
    query, heads = call.query, call.query.shape[1]
    dtype = torch.promote_types(torch.promote_types(query.dtype, call.key.dtype), torch.float32)
    highest = torch.full((heads,), -torch.inf, dtype=dtype, device=query.device)
    lowest = torch.full_like(highest, torch.inf)
    with torch.autocast(query.device.type, enabled=False):
        for part in _blocks(call):
            logits, hidden = _logits(call, part, dtype)
            upper = logits if hidden is None else logits.masked_fill(hidden, -torch.inf)
            highest = torch.maximum(highest, upper.amax(dim=(0, 2, 3)))
            lower = logits if hidden is None else logits.masked_fill_(hidden, torch.inf)
            lowest = torch.minimum(lowest, lower.amin(dim=(0, 2, 3)))
    return LogitExtremes(highest, lowest)


def _blocks(call: AttentionCall) -> Iterator[tuple[slice, slice]]:
    """Sequences and keys to take together: as many keys as fit, and then as many sequences."""
    (batch, heads, length, _), keys = call.query.shape, call.key.shape[2]
    size = 4 * (BLOCK_ON_CPU if call.query.device.type == "cpu" else BLOCK)
    some = min(max(size // max(heads * length, 1), 1), max(keys, 1))
    few = min(max(size // max(heads * length * some, 1), 1), max(batch, 1))
    for first in range(0, batch, few):
        for key in range(0, keys, some):
            yield slice(first, first + few), slice(key, key + some)


def _logits(call: AttentionCall, part: tuple[slice, slice], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Logits ``(b, H, L, s)`` of some sequences and keys, and which of them are hidden."""
    sequences, keys = part
    query, key = call.query[sequences].to(dtype), call.key[sequences, :, keys].to(dtype)
    batch, heads, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width) * scale_of(call)
    logits = (grouped @ key.mT).reshape(batch, heads, length, key.shape[2])
    hidden = None
    if call.is_causal:
        places = torch.arange(call.key.shape[2], device=query.device)[keys]
        hidden = places > torch.arange(length, device=query.device).unsqueeze(1)
    elif call.attn_mask is not None:
        mask = call.attn_mask[(None,) * (4 - call.attn_mask.ndim)]
        mask = mask[sequences] if len(mask) > 1 else mask
        hidden = ~is_visible(mask)  # of the whole row: its largest number says what hides
        hidden = hidden[..., keys] if hidden.shape[-1] > 1 else hidden
    if call.query_mask is not None:
        ignored = ~call.query_mask[sequences][:, None, :, None]
        hidden = ignored if hidden is None else hidden | ignored
    return logits, hidden
