"""Attention entropy of single rows, without keeping the matrix they are rows of."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.attention_calls import (
    AttentionCall,
    additive,
    hidden_below,
    is_visible,
    is_visible_logit,
)
from lightning_collapse.utilities.private_torch import cpu_attention, efficient_attention

BLOCK = 2**22  # logits at a time: 16 MiB in single precision
BLOCK_ON_CPU = 2**18  # logits and weights together fill a core's own cache
LEAST = -80.0


class EntropyRows(NamedTuple):
    """Readings of rows of attention, each of shape ``(B, H, L)``.

    Attributes:
        entropy: In nats, 0 or more.
        visible: Number of keys the row sees; 0 for rows that do not count.
        max_logit: Largest logit among them.
        logit_norm: Euclidean norm of these logits after their mean is taken off.
    """

    entropy: Tensor
    visible: Tensor
    max_logit: Tensor
    logit_norm: Tensor


@full_precision
def rows_of_logits(logits: Tensor, hidden: Tensor | None = None) -> EntropyRows:
    r"""Entropy of the softmax of logits.

    With :math:`p = \operatorname{softmax}(s)`, :math:`-\sum_j p_j \log p_j = \log \sum_j e^{s_j} - \sum_j p_j s_j`:
    no logarithm of a probability that may have underflowed.

    Args:
        logits: Finite, shape ``(B, H, L, S)``.
        hidden: Boolean, broadcasts to the logits: keys that are not seen.
    """
    shown = logits
    if hidden is None:
        visible = torch.full_like(logits[..., 0], logits.shape[-1])
    else:
        # arithmetic with a small mask: filling the large one under a boolean costs several times as much
        visible = (logits.shape[-1] - hidden.sum(dim=-1)).to(logits).expand(logits.shape[:-1])
        shown = logits + torch.zeros_like(hidden, dtype=logits.dtype).masked_fill(hidden, -torch.inf)
    top = shown.amax(dim=-1)
    weights = (shown - top.unsqueeze(-1)).exp()
    mass = weights.sum(dim=-1)
    entropy = top + mass.log() - (weights * logits).sum(dim=-1) / mass
    seen: Tensor | float = 1.0 if hidden is None else (~hidden).to(logits)
    centered = (logits - ((logits * seen).sum(dim=-1) / visible).unsqueeze(-1)) * seen
    return EntropyRows(entropy.clamp_min(0), visible, top, centered.norm(dim=-1))


@full_precision
def rows_of_masked_logits(logits: Tensor) -> EntropyRows:
    """The same of logits ``(B, H, L, S)`` that hold their mask, see :func:`is_visible_logit`."""
    hidden = ~is_visible_logit(logits)
    return rows_of_logits(logits.masked_fill(hidden & ~logits.isnan(), 0.0), hidden & ~logits.isnan())


def rows_of_call(call: AttentionCall) -> EntropyRows:
    """Readings of every row of a call, with all its logits in memory: for few rows."""
    return _counting(rows_of_logits(*logits_of_call(call)), call.query_mask)


def logits_of_call(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """All logits ``(B, H, L, S)`` of a call, what its mask adds included, and which of them are hidden, if any.

    In at least single precision. What a mask of numbers hides is left out of the sum and stays finite.
    """
    query, key, mask = call.query, call.key, visibility(call)
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    batch, heads, length, width = query.shape
    with torch.autocast(query.device.type, enabled=False):
        # query heads of one group read the same keys: as more rows of one product
        grouped = query.to(dtype).reshape(batch, key.shape[1], -1, width) * scale_of(call)
        logits = (grouped @ key.to(dtype).transpose(-2, -1)).reshape(batch, heads, length, key.shape[2])
        hidden = None if mask is None else ~is_visible(mask)
        if mask is not None and hidden is not None and mask.dtype != torch.bool:
            logits = logits + mask.masked_fill(hidden, 0.0)
    return logits, hidden


def entropies_of_call(call: AttentionCall) -> tuple[Tensor, Tensor]:
    r"""Exact entropy of every row and the number of keys it sees, each ``(B, H, L)``; no ``L x S`` matrix is kept.

    The fused kernel with the keys in place of the values returns :math:`\sum_j p_{ij} k_j`, and beside it the
    logarithm of the softmax's denominator :math:`Z_i`, so :math:`H_i = \log Z_i - c\, q_i \cdot \sum_j p_{ij} k_j`
    costs one pass of fused attention. Where logits are shifted by a mask, or there is no such kernel, logits are made
    for some rows at a time, as many as stay in the cache.
    """
    query, key = call.query, call.key
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    call = call._replace(query=query.to(dtype), key=key.to(dtype))
    with torch.autocast(query.device.type, enabled=False):
        fused = _fused(call)
        if fused is None:
            entropy, visible = _in_blocks(call)
        else:
            expected, log_mass = fused
            entropy = log_mass - scale_of(call) * expected.mul_(call.query).sum(dim=-1)
            visible = _visible(call).to(entropy)
    readings = EntropyRows(entropy.clamp_min(0), visible.expand_as(entropy), entropy, entropy)
    return _counting(readings, call.query_mask)[:2]


def _fused(call: AttentionCall) -> tuple[Tensor, Tensor] | None:
    """Expected key ``(B, H, L, E)`` and log of the denominator ``(B, H, L)``; ``None`` where there is no kernel."""
    query, key, mask = call.query, call.key, call.attn_mask
    cpu, cuda = query.device.type == "cpu", query.device.type == "cuda" and query.dtype == torch.float32
    if not (cpu or (cuda and mask is None)) or (mask is not None and mask.dtype != torch.bool) or not key.numel():
        return None
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1) if group > 1 else key.contiguous()
    query, scale = query.contiguous(), scale_of(call)
    try:
        if cpu:
            bias = None
            if mask is not None:
                bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
                bias = bias[(None,) * (4 - bias.ndim)].expand(-1, -1, query.shape[2], key.shape[2])
            expected, log_mass = cpu_attention(query, key, call.is_causal, bias, scale)
        else:
            expected, log_mass = efficient_attention(query, key, call.is_causal, scale)
    except (AttributeError, NotImplementedError, RuntimeError):  # these kernels are no promise of torch's
        return None
    return expected, log_mass[..., : query.shape[2]]  # CUDA pads to a multiple of 32


def _in_blocks(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Entropy ``(B, H, L)``, NaN where all logits of a row are minus infinity; and keys seen, broadcasts to it."""
    query, (batch, heads, length, _), keys = call.query, call.query.shape, call.key.shape[2]
    size = BLOCK_ON_CPU if query.device.type == "cpu" else BLOCK
    rows = min(max(size // max(keys, 1), 1), length)
    some = min(max(size // max(keys * rows, 1), 1), heads)
    # contiguous after the turn: the product is a third faster
    turned = (call.key * scale_of(call)).mT.contiguous().repeat_interleave(heads // call.key.shape[1], dim=1)
    mask = visibility(call)
    bias = query.new_zeros(1, 1, 1, 1) if mask is None else additive(mask)
    bias = bias[(None,) * (4 - bias.ndim)]
    entropy, visible = query.new_empty(batch, heads, length), query.new_empty(*bias.shape[:2], length)
    bias = bias.expand(batch, heads, length, keys)
    logits, weights = query.new_empty(2, some * rows * keys)
    for i, head, row in product(range(batch), range(0, heads, some), range(0, length, rows)):
        part = i, slice(head, head + some), slice(row, row + rows)
        shape = *query[part].shape[:2], keys
        block, weight = (buffer[: prod(shape)].view(shape) for buffer in (logits, weights))
        if i < visible.shape[0] and head < visible.shape[1]:  # once for each row of the mask
            hidden = torch.le(bias[part], hidden_below(bias[part]), out=weight).sum(dim=-1)
            visible[part] = keys - hidden[: visible.shape[1]]
        torch.bmm(query[part], turned[i, part[1]], out=block).add_(bias[part])
        # below that a key has no weight, and exponentials that underflow are slow
        block.sub_(block.amax(dim=-1, keepdim=True)).clamp_(min=LEAST)
        mass = torch.exp(block, out=weight).sum(dim=-1)
        entropy[part] = mass.log() - weight.mul_(block).sum(dim=-1) / mass
    return entropy, visible


def visibility(call: AttentionCall) -> Tensor | None:
    """The mask of a call, a boolean one ``(L, S)`` for a causal call; ``None`` if every query sees every key."""
    if not call.is_causal:
        return call.attn_mask
    ones = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool, device=call.query.device)
    return ones.tril()


def _visible(call: AttentionCall) -> Tensor:
    """Keys that each row sees, broadcasts to ``(B, H, L)``."""
    length, keys = call.query.shape[2], call.key.shape[2]
    if call.is_causal:
        return torch.arange(1, length + 1, device=call.query.device).clamp_max(keys)
    if call.attn_mask is None:
        return torch.full((length,), keys, device=call.query.device)
    return call.attn_mask.expand(*call.attn_mask.shape[:-1], keys).sum(dim=-1)


def _counting(readings: EntropyRows, query_mask: Tensor | None) -> EntropyRows:
    if query_mask is None:
        return readings
    return readings._replace(visible=readings.visible * query_mask.unsqueeze(1))


def scale_of(call: AttentionCall) -> float:
    """Factor on ``query @ key``."""
    return call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
