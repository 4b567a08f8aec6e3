"""Attention gain: the low-pass gain of whole maps, summed over the heads and sequences that a point rests on."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from lightning_collapse.functional.low_pass_gain import low_pass_gain, low_pass_gain_null
from lightning_collapse.monitoring.attention_hooks import Captured
from lightning_collapse.monitoring.attention_statistics import visible_logits
from lightning_collapse.utilities.attention_calls import AttentionCall
from lightning_collapse.utilities.features import evenly

MOST = 2**22
"""Weights to read of a call, 16 MiB: of more, some heads alone."""
LONGEST = 8192
_SUMS = ("seen", "maps", "lost", "gain", "null", "nulls")


class GainStatistics:
    """Sums and the largest of the gains of a call, by head; of maps in which every query sees every key that counts.

    Causal maps, windows and packed documents are seen and not read. Of heads that are left out all numbers are 0.

    Raises:
        ValueError: If the sequences are longer than 8,192 tokens: a whole map would be too large.

    Example:
        >>> query, key = torch.zeros(1, 2, 4, 8), torch.ones(1, 2, 4, 8)
        >>> statistics = GainStatistics()
        >>> statistics(AttentionCall(query, key))[0][:, :2], statistics(AttentionCall(query, key, True))[0][:, :2]
        (tensor([[1., 1.],
                [1., 1.]]), tensor([[1., 0.],
                [1., 0.]]))
    """

    columns = len(_SUMS), 1

    def __call__(self, captured: Captured) -> tuple[Tensor, Tensor]:
        """Sums ``(H, 6)`` and the largest gain ``(H, 1)``."""
        tensor = captured.query if isinstance(captured, AttentionCall) else captured
        heads, length = tensor.shape[1:3]
        keys = captured.key.shape[2] if isinstance(captured, AttentionCall) else captured.shape[3]
        sums = torch.zeros(heads, len(_SUMS), device=tensor.device)
        largest = torch.full((heads, 1), -torch.inf, device=tensor.device)
        if length != keys or length < 2:  # of other keys than the queries', or of one token
            sums[:, 0] = len(tensor)
            return sums, largest
        if length > LONGEST:
            raise ValueError(f"maps of {length} tokens are too large, {LONGEST} are the most")
        picked = evenly(torch.arange(heads, device=tensor.device), max(MOST // (len(tensor) * length**2), 1))
        columns, gains = _gains(*_maps(_of_heads(captured, picked)))
        return sums.index_copy(0, picked, columns), largest.index_copy(0, picked, gains)

    @staticmethod
    def read(table: Tensor) -> dict[str, float]:
        """Mean, largest, null and counts of what calls and processes have summed up, ``(H, 7)`` on the host."""
        total = dict(zip(_SUMS, table[:, :-1].sum(dim=0).tolist(), strict=True))
        maps = total["maps"]
        null = total["null"] / maps if maps and total["nulls"] == maps else nan
        mean, largest = (total["gain"] / maps, float(table[:, -1].amax())) if maps else (nan, nan)
        return total | {"mean": mean, "largest": largest, "null": null}


def _of_heads(captured: Captured, picked: Tensor) -> Captured:
    """The same attention of some query heads."""
    if isinstance(captured, Tensor):
        return captured.index_select(1, picked)
    heads, mask = captured.query.shape[1], captured.attn_mask
    if mask is not None and mask.ndim > 2 and mask.shape[-3] == heads:
        mask = mask.index_select(-3, picked)
    key = captured.key.index_select(1, picked * captured.key.shape[1] // heads)
    return captured._replace(query=captured.query.index_select(1, picked), key=key, attn_mask=mask)


def _maps(captured: Captured) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(B, H, L, L)``, queries that count ``(B, H, L)``, and whether all see the same."""
    logits, hidden = visible_logits(captured)
    visible = torch.ones_like(logits, dtype=torch.bool) if hidden is None else (~hidden).expand_as(logits)
    given = visible.any(dim=-1)
    if isinstance(captured, AttentionCall) and captured.query_mask is not None:
        given = given & captured.query_mask.unsqueeze(1)
    seen = (visible & given.unsqueeze(-1)).any(dim=-2)
    rows = given & seen  # what no query sees is padding, on whichever side
    alike = (visible == seen.unsqueeze(-2)) | ~rows.unsqueeze(-1)
    return logits, rows, alike.flatten(2).all(dim=-1) & (rows.sum(dim=-1) > 1)


def _gains(logits: Tensor, rows: Tensor, both_ways: Tensor) -> tuple[Tensor, Tensor]:
    counted = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    finite = (logits.isfinite() | ~counted).flatten(2).all(dim=-1)
    logits, maps = logits.where(counted & logits.isfinite(), 0.0), both_ways & finite
    number = rows.sum(dim=-1).to(logits).clamp_min(2)
    centered = (logits - (logits.sum(dim=-1) / number.unsqueeze(-1)).unsqueeze(-1)).where(counted, 0.0)
    # of each row about its mean, which a softmax does not see
    spread = (centered.square().sum(dim=(-2, -1)) / (number * (number - 1))).sqrt()
    null = low_pass_gain_null(spread, number)
    weights = logits.masked_fill(~counted & rows.any(dim=-1)[..., None, None], torch.finfo(logits.dtype).min)
    gain = low_pass_gain(weights.softmax(dim=-1), rows)
    known = null.isfinite() & maps
    columns = [torch.ones_like(gain), maps, both_ways & ~finite, gain.where(maps, 0.0), null.where(known, 0.0), known]
    sums = torch.stack([column.to(gain).sum(dim=0) for column in columns], dim=1)
    return sums, gain.where(maps, -torch.inf).amax(dim=0, keepdim=True).mT
