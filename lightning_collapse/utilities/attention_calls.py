"""Attention calls: queries, keys and masks of one call, from the ways it is written; and few rows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

HIDDEN = 5e3
"""Masks take more from the logits of hidden keys (``-1e4`` takes the least), and position biases take less."""


class AttentionCall(NamedTuple):
    """What attention weights are computed from, in the conventions of ``F.scaled_dot_product_attention``.

    Attributes:
        query: Shape ``(B, H, L, E)``.
        key: Shape ``(B, H, S, E)``, or ``(B, H_kv, S, E)`` where each of fewer heads serves a group of query heads.
        is_causal: Whether query ``i`` sees keys ``0..i`` only, counted from the first of each (torch's top-left rule).
        attn_mask: Boolean (true where a key is visible) or added to the logits; broadcasts to ``(B, H, L, S)``.
        scale: Factor on ``query @ key``; ``None`` for ``1 / sqrt(E)``.
        query_mask: Boolean, shape ``(B, L)``: queries that count, so padding does not; all if ``None``.
    """

    query: Tensor
    key: Tensor
    is_causal: bool = False
    attn_mask: Tensor | None = None
    scale: float | None = None
    query_mask: Tensor | None = None


def spread_rows(length: int, rows: int, device: torch.device) -> Tensor:
    """At most ``rows`` positions below ``length``, one from each of as many equal strata, shape ``(min(...),)``.

    Where in its stratum a position lies follows the golden ratio: with even spacing every row of an image would be
    read at the same column. The same positions every time; no random number is drawn.
    """
    if length <= rows:
        return torch.arange(length, device=device)
    stratum = torch.arange(rows, device=device)
    offset = (stratum * 40503 + 20252) % 65536  # in 2**-16: integers are the same on every device
    return (stratum * 65536 + offset) * length // (rows * 65536)


def sample(call: AttentionCall, rows: int, max_rows: int | None = None) -> AttentionCall:
    """The same attention for some of the queries; a causal call becomes one with a mask, unless all are kept.

    Args:
        call: Any call.
        rows: Queries to keep of each sequence, see :func:`spread_rows`.
        max_rows: Queries to keep of all sequences together: of more, every second or third ... sequence is dropped.
    """
    query, key, is_causal, mask, scale, query_mask = call
    positions = spread_rows(query.shape[2], rows, query.device)
    step = 1 if max_rows is None else _stride(query.shape[0], len(positions), max_rows)
    if step == 1 and len(positions) == query.shape[2]:
        return call
    if is_causal:
        mask = torch.arange(key.shape[2], device=query.device) <= positions.unsqueeze(1)
    elif mask is not None:
        mask = mask.expand(*mask.shape[:-2], query.shape[2], mask.shape[-1]).index_select(-2, positions)
        mask = mask[::step] if mask.ndim == 4 and len(mask) > 1 else mask
    if query_mask is not None:
        query_mask = query_mask[::step].index_select(1, positions)
    key = key[::step] if len(key) > 1 else key
    return AttentionCall(query[::step].index_select(2, positions), key, False, mask, scale, query_mask)


def is_visible(mask: Tensor) -> Tensor:
    """Where a mask ``(..., S)`` in torch's convention lets a key be seen.

    Where it is true; or where what it adds is no more than :data:`HIDDEN` below the row's largest, or below zero if
    that is larger: a row of nothing but ``-1e9`` sees no key. A number that is not finite hides itself only.
    """
    if mask.dtype == torch.bool:
        return mask
    return ~(mask <= hidden_below(mask))


def hidden_below(mask: Tensor) -> Tensor:
    """What the hidden keys of a mask ``(..., S)`` that is added do not exceed, shape ``(..., 1)``."""
    return mask.amax(dim=-1, keepdim=True).float().clamp_min(0.0) - HIDDEN


def is_visible_logit(logits: Tensor) -> Tensor:
    """The same of logits ``(B, H, L, S)`` into which a mask went already, shape ``(B, 1, L, S)`` or theirs.

    Below the negative of :data:`HIDDEN` in every head: one head may lower a logit that far by itself, a mask lowers
    those of all. Half of the lowest number hides a key of one head alone.
    """
    hidden = (logits <= -HIDDEN).all(dim=1, keepdim=True) | (logits <= torch.finfo(logits.dtype).min / 2)
    return ~hidden


def additive(mask: Tensor) -> Tensor:
    """A mask as what is added to the logits, boolean ones with minus infinity for hidden keys."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)


def call_of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall | None:
    """The arguments of ``F.scaled_dot_product_attention``, of any number of dimensions; ``None`` for nested tensors."""
    if query.is_nested or key.is_nested or query.ndim < 2:
        return None
    if query.ndim == 3 and attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unsqueeze(1)
    if query.ndim > 4:
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2]).flatten(0, -4)
        key = key.expand(*query.shape[:-3], *key.shape[-3:])
    return AttentionCall(_four(query), _four(key), is_causal, attn_mask, scale)


def logits_of_softmax(logits: Tensor, query_mask: Tensor | None, rows: int, max_rows: int) -> Tensor:
    """Some rows of logits ``(B, H, L, S)`` that a softmax receives, minus infinity where a row does not count.

    One column more than there are queries is a learned sink, if no row hides the last: a logit that takes part in the
    softmax and is no key. It is taken for hidden, so entropies are of the weights that keys share.

    Args:
        logits: Attention written out, masks added or filled in.
        query_mask: Boolean, shape ``(B, L)``: queries that count.
        rows: As in :func:`call_of_multi_head`.
        max_rows: As in :func:`call_of_multi_head`.
    """
    batch, _, length, columns = logits.shape
    positions = spread_rows(length, rows, logits.device)
    step = _stride(batch, len(positions), max_rows)
    picked = logits[::step].index_select(2, positions)
    if columns == length + 1:
        sink = is_visible_logit(picked)[..., -1].all() & (torch.arange(columns, device=logits.device) == length)
        picked = picked.masked_fill(sink, -torch.inf)
    if query_mask is None or query_mask.shape != (batch, length):
        return picked
    return picked.masked_fill(~query_mask[::step].index_select(1, positions)[:, None, :, None], -torch.inf)


def call_of_multi_head(arguments: Mapping[str, Any], rows: int, max_rows: int) -> AttentionCall | None:
    """Some rows of ``F.multi_head_attention_forward``, whose arguments these are, projected to queries and keys.

    What ``add_bias_kv`` and ``add_zero_attn`` append to the keys are learned sinks and left out.

    Returns:
        A call of the sampled rows; ``None`` where keys come from elsewhere (``static_k``) or the tensors are nested.
    """
    query, key = arguments["query"], arguments["key"]
    if arguments.get("static_k") is not None or query.is_nested or key.is_nested:
        return None
    padding, itself = arguments.get("key_padding_mask"), query is key
    if query.ndim == 2:  # one sequence, without a batch
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        padding = None if padding is None else padding.unsqueeze(0)
    (length, batch, width), heads = query.shape, arguments["num_heads"]
    positions = spread_rows(length, rows, query.device)
    step = _stride(batch, len(positions), max_rows)
    mask = _mask_of_multi_head(arguments.get("attn_mask"), positions, batch, step)
    query_mask = None
    if padding is not None:
        padding = (~padding if padding.dtype == torch.bool else padding)[::step, None, None]
        mask = padding if mask is None else _both(mask, padding)
        if itself:
            query_mask = is_visible(padding)[:, 0, 0].index_select(1, positions)
    if arguments.get("use_separate_proj_weight"):
        weights = arguments["q_proj_weight"], arguments["k_proj_weight"]
    else:
        weights = arguments["in_proj_weight"].chunk(3)[:2]
    biases = (None, None) if arguments["in_proj_bias"] is None else arguments["in_proj_bias"].chunk(3)[:2]
    inputs = query[:, ::step].index_select(0, positions), key[:, ::step]
    projected = [_heads(x, w, b, heads) for x, w, b in zip(inputs, weights, biases, strict=True)]
    return AttentionCall(projected[0], projected[1], False, mask, (width // heads) ** -0.5, query_mask)


def _heads(inputs: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Project ``(L, B, D)`` to heads ``(B, H, L, E)``, in at least single precision."""
    dtype = torch.promote_types(torch.promote_types(inputs.dtype, weight.dtype), torch.float32)
    with torch.autocast(inputs.device.type, enabled=False):
        projected = nn.functional.linear(inputs.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return projected.reshape(*projected.shape[:-1], heads, -1).permute(1, 2, 0, 3)


def _mask_of_multi_head(mask: Tensor | None, positions: Tensor, batch: int, step: int) -> Tensor | None:
    """Rows of a mask ``(L, S)`` or ``(B * H, L, S)`` in which true hides, as one in which true shows."""
    if mask is None:
        return None
    mask = mask.reshape(batch, -1, *mask.shape[1:])[::step] if mask.ndim == 3 and len(mask) > 1 else mask
    mask = mask.index_select(-2, positions)
    return ~mask if mask.dtype == torch.bool else mask


def _both(mask: Tensor, other: Tensor) -> Tensor:
    """Two masks at once; boolean if both are."""
    if mask.dtype == other.dtype == torch.bool:
        return mask & other
    return additive(mask) + additive(other)


def _four(tensor: Tensor) -> Tensor:
    if tensor.ndim > 4:
        return tensor.flatten(0, -4)
    return tensor.unsqueeze(-3).reshape(-1, 1, *tensor.shape[-2:]) if tensor.ndim < 4 else tensor


def _stride(sequences: int, rows: int, max_rows: int) -> int:
    return max(-(-sequences * rows // max_rows), 1)
