"""Attention statistics: what sums and maxima of some attention rows tell of logits, heads, queries and keys."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from lightning_collapse.functional.attention_capacity import (
    SINK,
    effective_keys,
    key_participation,
    logit_lead,
    sink_weight,
)
from lightning_collapse.functional.attention_diversity import (
    head_cosine,
    head_cosine_null,
    head_divergence,
    query_nmi,
    query_nmi_null,
)
from lightning_collapse.functional.attention_rows import logits_of_call
from lightning_collapse.monitoring.attention_hooks import Captured
from lightning_collapse.utilities.attention_calls import AttentionCall, is_visible_logit

LONG = 64
"""Keys that a row must see for heads to be compared on it, or half of those there are: short rows are alike."""
_SUMS = (
    "rows",
    "lost",
    "key_share",
    "key_share_null",
    "pairs",
    "cosine",
    "cosine_null",
    "divergence",
    "sequences",
    "nmi",
    "nmi_null",
    "sinks",
    "key_heads",
    "participation",
    "participation_null",
)
_MAXIMA = ("highest", "minus_lowest", "lead")


class LogitStatistics:
    """Sums and maxima of the heads of a call: of rows that see two keys or more, and hold no NaN or infinity.

    Example:
        >>> statistics = LogitStatistics()
        >>> sums, maxima = statistics(AttentionCall(torch.zeros(1, 2, 4, 8), torch.ones(1, 2, 4, 8)))
        >>> LogitStatistics.read(torch.cat([sums, maxima], dim=1).double())["effective_keys"]
        (1.0, 1.0)
    """

    columns = len(_SUMS), len(_MAXIMA)

    def __call__(self, captured: Captured) -> tuple[Tensor, Tensor]:
        """Sums ``(H, 15)`` and maxima ``(H, 3)``."""
        logits, hidden = visible_logits(captured)
        batch, heads, length, keys = logits.shape
        visible = logits.new_full((), keys) if hidden is None else (~hidden).sum(dim=-1).to(logits)
        visible = visible.expand(batch, heads, length)
        finite = logits.isfinite().all(dim=-1)
        given = (visible > 1) & _given(captured, finite)
        counts = given & finite
        logits = logits.where(finite.unsqueeze(-1), 0.0)
        weights = (logits if hidden is None else logits.masked_fill(hidden, -torch.inf)).softmax(dim=-1)
        weights = weights.where(counts.unsqueeze(-1), 0.0)
        spread = _spread(logits, hidden, visible)
        columns = {"rows": counts.to(logits), "lost": (given & ~finite).to(logits)}
        columns["key_share"] = _of(counts, effective_keys(weights).simpson / visible.clamp_min(1))
        columns["key_share_null"] = _of(counts, (-spread.square()).exp())
        sums = {name: column.sum(dim=(0, 2)) for name, column in columns.items()}
        sums |= _of_pairs(weights, spread, counts & (visible >= min(LONG, keys / 2)))
        sums |= _of_sequences(weights, hidden, counts)
        sums |= _of_keys(captured, hidden, counts)
        missing = ~counts.unsqueeze(-1) if hidden is None else hidden | ~counts.unsqueeze(-1)
        maxima = {
            "highest": logits.masked_fill(missing, -torch.inf).amax(dim=(0, 2, 3)),
            "minus_lowest": (-logits).masked_fill(missing, -torch.inf).amax(dim=(0, 2, 3)),
            "lead": logit_lead(weights, visible).where(counts, -torch.inf).amax(dim=(0, 2)),
        }
        return torch.stack([sums[name] for name in _SUMS], 1), torch.stack([maxima[name] for name in _MAXIMA], 1)

    @staticmethod
    def read(table: Tensor) -> dict[str, tuple[float, float]]:
        """Curves of a layer and their nulls, from what calls and processes have summed up, on the host, ``(H, 18)``.

        Means are over rows, then over heads; the largest and the smallest logit and the lead are of any head.
        """
        table = table[table[:, 0] > 0]
        total = dict(zip((*_SUMS, *_MAXIMA), table.sum(dim=0).tolist(), strict=True))
        largest = dict(zip((*_SUMS, *_MAXIMA), table.amax(dim=0).tolist() if len(table) else [nan] * 18, strict=True))

        def mean(name: str, count: str) -> float:
            return total[name] / total[count] if total[count] else nan

        nmi, nmi_null = mean("nmi", "sequences"), mean("nmi_null", "sequences")
        return {
            "max_logit": (largest["highest"], nan),
            "min_logit": (-largest["minus_lowest"], nan),
            "head_cosine": (mean("cosine", "pairs"), mean("cosine_null", "pairs")),
            "head_divergence": (mean("divergence", "pairs"), nan),
            "query_nmi": (nmi, nmi_null),
            "query_nmi_excess": (nmi - nmi_null, 0.0),
            "sink_share": (mean("sinks", "sequences"), nan),
            "effective_keys": (mean("key_share", "rows"), mean("key_share_null", "rows")),
            "logit_lead": (largest["lead"], nan),
            "key_participation": (mean("participation", "key_heads"), mean("participation_null", "key_heads")),
        }


def visible_logits(captured: Captured) -> tuple[Tensor, Tensor | None]:
    """Logits ``(B, H, L, S)`` and which of them are hidden, of four dimensions; hidden ones are finite."""
    if isinstance(captured, AttentionCall):
        logits, hidden = logits_of_call(captured)
        return logits, None if hidden is None else hidden[(None,) * (4 - hidden.ndim)]
    logits = captured.float() if captured.dtype.itemsize < 4 else captured
    hidden = ~is_visible_logit(logits) & ~logits.isnan()
    return logits.masked_fill(hidden, 0.0), hidden


def _given(captured: Captured, like: Tensor) -> Tensor:
    """Queries that count."""
    if isinstance(captured, AttentionCall) and captured.query_mask is not None:
        return captured.query_mask.unsqueeze(1).expand_as(like)
    return torch.ones_like(like)


def _spread(logits: Tensor, hidden: Tensor | None, visible: Tensor) -> Tensor:
    """Standard deviation of the logits that a row sees, ``(B, H, L)``."""
    seen = torch.ones_like(logits) if hidden is None else (~hidden).to(logits).expand_as(logits)
    number = visible.clamp_min(1).unsqueeze(-1)
    centered = (logits - (logits * seen).sum(dim=-1, keepdim=True) / number) * seen
    return (centered.square().sum(dim=-1) / number.squeeze(-1)).sqrt()


def _of_pairs(weights: Tensor, spread: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Sums over rows on which every head counts; each head is given an equal part."""
    heads, rows = weights.shape[1], counts.all(dim=1)
    rows = rows & (heads > 1)
    columns = {
        "pairs": rows.to(weights),
        "cosine": _of(rows, head_cosine(weights)),
        "cosine_null": _of(rows, head_cosine_null(spread)),
        "divergence": _of(rows, head_divergence(weights)),
    }
    return {name: (column.sum() / heads).expand(heads) for name, column in columns.items()}


def _of_sequences(weights: Tensor, hidden: Tensor | None, counts: Tensor) -> dict[str, Tensor]:
    """Sums over sequences of which two queries count."""
    some = counts.sum(dim=-1) > 1
    null = weights.new_zeros(())
    visible = torch.ones_like(weights[:1, :1, :1], dtype=torch.bool)
    if hidden is not None:
        visible = ~hidden
        shared = visible.shape[1] == 1
        null = query_nmi_null(visible.expand(len(weights), -1, weights.shape[2], -1), _shared(counts, shared))
    columns = {
        "sequences": some.to(weights),
        "nmi": _of(some, query_nmi(weights, counts)),
        "nmi_null": _of(some, null.to(weights).expand_as(some)),
        "sinks": _of(some, (sink_weight(weights, visible & counts.unsqueeze(-1)) > SINK).to(weights)),
    }
    return {name: column.sum(dim=0) for name, column in columns.items()}


def _shared(counts: Tensor, shared: bool) -> Tensor:
    return counts.any(dim=1, keepdim=True) if shared else counts


def _of_keys(captured: Captured, hidden: Tensor | None, counts: Tensor) -> dict[str, Tensor]:
    """Sums over sequences of what their keys fill; logits alone do not show keys."""
    names = ("key_heads", "participation", "participation_null")
    heads = counts.shape[1]
    if not isinstance(captured, AttentionCall):
        return {name: torch.zeros(heads, device=counts.device) for name in names}
    key = captured.key
    seen = torch.ones_like(key[:, :1, :, 0], dtype=torch.bool)
    if hidden is not None:
        seen = (~hidden).any(dim=2).any(dim=1, keepdim=True).expand(len(key), -1, -1)
    key = key.where(seen.unsqueeze(-1), 0)
    filled = key_participation(key)
    number, width = seen.sum(dim=-1).clamp_min(1), key.shape[-1]
    known = filled.isfinite()
    columns = [known.to(filled), _of(known, filled), _of(known, (1 / (1 + width / number)).expand_as(filled))]
    group = heads // key.shape[1]
    return {name: column.sum(dim=0).repeat_interleave(group) for name, column in zip(names, columns, strict=True)}


def _of(counts: Tensor, values: Tensor) -> Tensor:
    """Values of what counts, 0 of the rest."""
    return values.where(counts, 0.0)
