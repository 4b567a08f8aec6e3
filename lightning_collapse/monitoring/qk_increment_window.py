"""Query-key increment window: how the products of query and key weights have moved since the last point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.functional.qk_increments import qk_increments
from lightning_collapse.utilities.attention_projections import AttentionProjections, find_projections
from lightning_collapse.utilities.modules import Tap

MEASURES = ("norm", "stable_rank", "erank")
CURVES = tuple(f"delta{order}_{name}" for order in (2, 3) for name in MEASURES)


class QKIncrementWindow:
    """Keeps copies of the query and key weights of some heads from one point to the next.

    Heads are those with evenly spread numbers, ``heads`` of each layer; memory is two matrices ``(d, d_k)`` of each.
    Weights in half precision are left out: their differences are rounding.

    Args:
        module: The model.
        taps: Layers that attention may belong to: watched are those with one module in them whose projections are
            known by name, and nothing between these and their product.
        heads: Heads to watch of each layer.
        warn: Says something once.
    """

    def __init__(self, module: nn.Module, taps: Sequence[Tap], heads: int, warn: Callable[[str], None]) -> None:
        self._heads, self._warn = heads, warn
        usable = {id(found.module): found for found in find_projections(module) if not found.reason}
        inside = {tap.name: [usable[id(m)] for m in tap.module.modules() if id(m) in usable] for tap in taps}
        self._known = {name: found[0] for name, found in inside.items() if len(found) == 1}
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(self, heads: Mapping[str, int], widths: Mapping[str, int]) -> dict[tuple[str, str], Tensor]:
        """Means over heads by layer and curve; none of a layer at its first point.

        Args:
            heads: How many every layer has that has run.
            widths: How wide they are, where that is known.
        """
        readings: dict[tuple[str, str], Tensor] = {}
        for name, projections in self._known.items():
            now = self._weights(name, projections, heads[name], widths.get(name)) if name in heads else None
            if now is None:
                continue
            before, self._before[name] = self._before.get(name), now.clone()
            if before is not None and before.shape == now.shape:
                found = qk_increments(before[0], before[1], now[0], now[1])
                values = (value.mean() for increment in found for value in increment)
                readings |= {(name, curve): value for curve, value in zip(CURVES, values, strict=True)}
        return readings

    def state_dict(self) -> dict[str, Tensor]:
        """The copies, on the host."""
        return {name: copy.to("cpu", copy=True) for name, copy in self._before.items()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a state."""
        self._before = {name: copy.to(device, copy=True) for name, copy in state.items() if name in self._known}

    def _weights(self, name: str, projections: AttentionProjections, number: int, width: int | None) -> Tensor | None:
        """Those of some heads, ``(2, h, d, d_k)``; ``None`` where they cannot be read."""
        try:
            query, key = projections.parts(number, width)
        except ValueError:
            return None
        if query.weight.dtype.itemsize < 4:
            reason = "differences of weights in half precision are rounding"
            self._warn(f"no increments of query and key weights are drawn: {reason}.")
            return None
        if query.rows.shape[1] != key.rows.shape[1]:  # keys come from features of another width
            return None
        places = {(2 * i + 1) * number // (2 * self._heads) for i in range(self._heads)}
        chosen = torch.tensor(sorted(places), device=query.weight.device)
        keys = key.size * number // query.size
        return torch.stack(
            [
                query.heads(number).index_select(0, chosen),
                key.heads(keys).index_select(0, chosen * keys // number),
            ]
        )
