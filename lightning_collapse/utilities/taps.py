"""Rows of chosen layers, copied out of the forward pass of the batches that matter."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_collapse.utilities.features import as_row_mask, as_rows, evenly
from lightning_collapse.utilities.modules import Tap, in_backward, is_channels_first


class RowTaps:
    """Forward hooks that keep rows of features while :attr:`armed`, and cost one ``if`` while not.

    Every call of a layer is kept (siamese models call it once per view), except activation checkpointing's
    recomputation in the backward pass. Rows are copied: a later in-place operation would change a view, and a slice
    would keep the whole activation alive. No graph is kept, and nothing waits for the device.

    Args:
        taps: Where to listen.

    Attributes:
        armed: Whether to keep rows now.
        mask: Padding mask ``(N, L)`` of the running batch; rows of tokens get their part of it.
        limits: Rows to keep per call by tap name, evenly spaced; while unknown up to four per feature, 1024 at most.
        shapes: Shape ``(rows, D)`` of every call before that limit, by tap name.
        rows: Kept rows by tap name, one ``(n, D)`` matrix per call.
        masks: Which of them count, by tap name, one ``(n,)`` mask or ``None`` per call.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.armed = False
        self.mask: Tensor | None = None
        self.limits: dict[str, int] = {}
        self.shapes: dict[str, list[tuple[int, int]]] = {tap.name: [] for tap in taps}
        self.rows: dict[str, list[Tensor]] = {tap.name: [] for tap in taps}
        self.masks: dict[str, list[Tensor | None]] = {tap.name: [] for tap in taps}
        self._handles: list[RemovableHandle] = [self._listen(tap) for tap in taps]

    def clear(self) -> None:
        """Forget the rows."""
        for name in self.rows:
            self.rows[name].clear()
            self.masks[name].clear()
            self.shapes[name].clear()
        self.mask = None

    def remove(self) -> None:
        """Stop listening; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def take(self, name: str) -> tuple[Tensor, Tensor] | None:
        """All rows of a tap as ``(n, D)`` and which of them count ``(n,)``; ``None`` if it did not run.

        Rows of another width than the last ones are left out.
        """
        kept = [(rows, mask) for rows, mask in zip(self.rows[name], self.masks[name], strict=True) if len(rows)]
        kept = [(rows, mask) for rows, mask in kept if rows.shape[1] == kept[-1][0].shape[1]]
        if not kept:
            return None
        rows = torch.cat([rows for rows, _ in kept])
        masks = [mask if mask is not None else rows.new_ones(len(rows), dtype=torch.bool) for rows, mask in kept]
        return rows, torch.cat(masks)

    def _listen(self, tap: Tap) -> RemovableHandle:
        keep = self._keeper(tap)
        if tap.side == "input":

            def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                keep((*args, *kwargs.values()))

            return tap.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            keep(output)

        return tap.module.register_forward_hook(after)

    def _keeper(self, tap: Tap) -> Callable[[Any], None]:
        name, channels_first = tap.name, is_channels_first(tap.module) and tap.side == "output"

        def keep(value: Any) -> None:
            if not self.armed or in_backward():
                return
            with torch.no_grad():
                rows = as_rows(value, channels_first)
                if rows is None:
                    return
                mask = as_row_mask(value, self.mask)
                count, width = rows.shape
                limit = self.limits.get(name, min(4 * width, 1024))
                self.shapes[name].append((count, width))
                self.rows[name].append(evenly(rows.detach(), limit))
                self.masks[name].append(mask if mask is None else evenly(mask, limit))

        return keep
