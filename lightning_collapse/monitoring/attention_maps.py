"""Attention maps on demand: the weights of every layer of a model for one batch, mean over heads."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.monitoring.attention_hooks import AttentionHooks, Captured
from lightning_collapse.monitoring.attention_statistics import visible_logits
from lightning_collapse.monitoring.attention_window import POINT_AT, attention_taps
from lightning_collapse.utilities.preserved_state import preserved_state


def attention_maps(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Run a model once in eval mode and return its attention, whichever of torch's functions computes it.

    All maps are in memory at once: for few and short sequences. The model is as it was afterwards.

    Args:
        model: Any module, not compiled; see :class:`~lightning_collapse.monitoring.AttentionHooks` for what is seen.
        *args: Of its call.
        **kwargs: Of its call.

    Returns:
        Shape ``(L, B, T, T)``, in the order of the calls, rows that sum to one, 0 where a query sees no key.

    Raises:
        ValueError: If no attention is seen, its calls differ in shape, or one cannot be read.

    Example:
        >>> block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, batch_first=True)
        >>> attention_maps(nn.TransformerEncoder(block, 3, enable_nested_tensor=False), torch.randn(2, 5, 8)).shape
        torch.Size([3, 2, 5, 5])
    """
    maps: list[Tensor] = []

    def keep(name: str, captured: Captured) -> None:
        logits, hidden = visible_logits(captured)
        shown = logits if hidden is None else logits.masked_fill(hidden, -torch.inf)
        maps.append(shown.softmax(dim=-1).nan_to_num(0.0).mean(dim=1))

    def failed(name: str, error: Exception) -> None:
        raise ValueError(f"The attention of `{name}` cannot be read: {error}") from error

    taps, outermost = attention_taps(model, None)
    hooks = AttentionHooks(taps, keep, failed, sys.maxsize, sys.maxsize, outermost)
    fused = torch.backends.mha.get_fastpath_enabled()
    with preserved_state(model, gradients=False, autocast=True):
        torch.backends.mha.set_fastpath_enabled(False)  # one operation, which shows no attention
        hooks.armed = True
        try:
            model(*args, **kwargs)
        finally:
            hooks.armed = False
            torch.backends.mha.set_fastpath_enabled(fused)
    if not maps or len({each.shape for each in maps}) > 1:
        raise ValueError(f"{type(model).__name__} shows {len(maps)} maps of attention of one shape. {POINT_AT}")
    return torch.stack(maps)
