"""Rows of chosen layers, copied out of the forward pass of the batches that matter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_collapse.utilities.features import as_row_mask, as_rows, evenly, token_at
from lightning_collapse.utilities.modules import Tap, is_channels_first, is_to_be_ignored


class Captured(NamedTuple):
    """What one tap brought in one batch.

    Attributes:
        rows: Copies of rows, shape ``(n, D)``.
        mask: Which of them are not padding, boolean ``(n,)``.
        returned: How many rows the layer returned, before the limit.
    """

    rows: Tensor
    mask: Tensor
    returned: int


class FeatureHooks:
    """Forward hooks that copy rows of features while :attr:`armed`, and cost one ``if`` while not.

    Every call of a layer counts (siamese models call it once per view), except activation checkpointing's
    recomputation in the backward pass. Rows are copied: a later in-place operation would change a view, and a slice
    would keep the whole activation alive. No graph is kept, and nothing waits for the device.

    Compiled with the model, a hook adds one graph for armed steps and one more per further call of its layer: it
    depends on nothing that changes from step to step, if :meth:`pop` is called after every armed one.

    Args:
        taps: Where to listen.
        limit: Rows to copy per call, spread over all; by default four per feature, but 1024 at most.
        position: Copy this token of every sequence instead of all of them, see
            :func:`~lightning_collapse.utilities.features.token_at`.

    Attributes:
        armed: Whether to copy rows now.
        mask: Padding mask ``(N, L)`` of the running batch; rows of tokens get their part of it.
        limits: Rows to copy per call of single taps, by name; those not named keep the ``limit``.
    """

    def __init__(self, taps: Sequence[Tap], limit: int | None = None, position: int | None = None) -> None:
        self.armed = False
        self.mask: Tensor | None = None
        self.limit = limit
        self.limits: Mapping[str, int] = {}
        self.position = position
        self._calls: dict[str, list[tuple[Tensor, Tensor | None, int]]] = {tap.name: [] for tap in taps}
        self._handles: list[RemovableHandle] = [self._listen(tap) for tap in taps]

    def pop(self) -> dict[str, Captured]:
        """Hand over what was heard since the last time, by tap name; taps that did not run are missing.

        Calls that returned another number of features than the last one are left out.
        """
        self.mask = None
        heard = {}
        for name, calls in self._calls.items():
            alike = [call for call in calls if call[0].shape[1] == calls[-1][0].shape[1]]
            if alike:
                masks = [
                    rows.new_ones(len(rows), dtype=torch.bool) if mask is None else mask for rows, mask, _ in alike
                ]
                rows = _cat([rows for rows, _, _ in alike])
                heard[name] = Captured(rows, _cat(masks), sum(returned for _, _, returned in alike))
            calls.clear()
        return heard

    def remove(self) -> None:
        """Stop listening and forget; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.armed = False
        self.pop()

    def _listen(self, tap: Tap) -> RemovableHandle:
        hear = self._ear(tap)
        if tap.side == "input":

            def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hear((*args, *kwargs.values()))

            return tap.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            hear(output)

        return tap.module.register_forward_hook(after)

    def _ear(self, tap: Tap) -> Callable[[Any], None]:
        name, channels_first = tap.name, is_channels_first(tap.module, tap.side)

        def hear(value: Any) -> None:
            if not self.armed or is_to_be_ignored():
                return
            with torch.no_grad():
                rows, mask = self._rows_of(value, channels_first)
                if rows is None:
                    return
                limit = self.limits.get(name) or self.limit or min(4 * rows.shape[1], 1024)
                kept = evenly(rows.detach(), limit), mask if mask is None else evenly(mask, limit)
                self._calls[name].append((*kept, rows.shape[0]))

        return hear

    def _rows_of(self, value: Any, channels_first: bool) -> tuple[Tensor | None, Tensor | None]:
        if self.position is None:
            return as_rows(value, channels_first), as_row_mask(value, self.mask, channels_first)
        return token_at(value, self.mask, self.position) or (None, None)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
