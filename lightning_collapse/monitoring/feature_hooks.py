"""Feature hooks: rows of chosen layers, copied out of the forward pass of the batches that matter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_collapse.monitoring.tap_hook import TapHook
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.features import as_row_mask, as_rows, evenly, find_features, is_tokens, token_at
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import Tap, is_to_be_ignored
from lightning_collapse.utilities.told_once import NAMED


class Captured(NamedTuple):
    """What one tap brought in one batch.

    Attributes:
        rows: Copies of rows, shape ``(n, D)``.
        mask: Which of them are not padding, boolean ``(n,)``.
        returned: How many rows the layer returned, before the limit.
        calls: How many of the rows are of each call of the layer, in order: ``rows.split(calls)`` are the views of a
            siamese model.
        sequences: Which sequence a row is of, counted through all calls, ``int64`` of shape ``(n,)``, where that was
            asked for and the layer returned tokens.
        views: Rows that may be two views of one thing, shape ``(2, n, D)``, where that was asked for: those of the
            first two calls, if they returned as many, or those of the two halves of a single call.
    """

    rows: Tensor
    mask: Tensor
    returned: int
    calls: tuple[int, ...] = ()
    sequences: Tensor | None = None
    views: Tensor | None = None


class FeatureHooks(HookOwner):
    """Forward hooks that copy rows of features while ``armed``, and cost one ``if`` while not.

    Every call of a layer counts (siamese models call it once per view), except activation checkpointing's
    recomputation in the backward pass. Rows are copied: a later in-place operation would change a view, and a slice
    would keep the whole activation alive. No graph is kept, and nothing waits for the device.

    Compiled with the model, hooks leave it one graph without a break, and nothing that is set here has it compiled
    anew. What fails inside a hook, and what cannot be read, is one warning that names the layer; copies and pickles of
    the model carry no hooks.

    Args:
        taps: Where to listen.
        limit: Rows to copy per call, spread over all; by default four per feature, but 1024 at most.
        position: Copy this token of every sequence instead of all of them, see
            :func:`~lightning_collapse.utilities.features.token_at`.
        containment: Where failures are told, in the name of its owner.
        sequences: Copy whole sequences of tokens, as many as the limit allows but one at least, and say which row is of
            which.
        positions: Take every position of a map for a row, and not their mean.

    Attributes:
        armed: Whether to copy rows now.
        views: Rows to copy of each view, 0 for none.
        halved: Taps whose single call may hold two views one behind the other; ``None`` for all of them.
        mask: Padding mask ``(N, L)`` of the running batch; rows of tokens get their part of it.
        limits: Rows to copy per call of single taps, by name; those not named keep the ``limit``.
        left_out: Why nothing is read of a tap, by name, of those that have failed.

    Example:
        >>> from lightning_collapse.utilities.modules import default_taps
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> hooks = FeatureHooks(default_taps(net))
        >>> hooks.armed = True
        >>> _ = net(torch.ones(8, 4))
        >>> {name: tuple(captured.rows.shape) for name, captured in hooks.pop().items()}
        {'0': (8, 3), '2': (8, 2), '2.input': (8, 3)}
        >>> hooks.remove()
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        limit: int | None = None,
        position: int | None = None,
        containment: Containment | None = None,
        sequences: bool = False,
        positions: bool = False,
    ) -> None:
        self.armed = False
        self.mask: Tensor | None = None
        self.limit = limit
        self.limits: Mapping[str, int] = {}
        self.position = position
        self.containment = containment or Containment(type(self).__name__)
        self.sequences = sequences
        self.positions = positions
        self.views = 0
        self.halved: Collection[str] | None = None
        self.left_out: dict[str, str] = {}
        self.doubted = False
        self._doubts: dict[str, str] = {}
        self._calls: dict[str, list[_Call]] = {tap.name: [] for tap in taps}
        self._hooks = [hook for tap in taps if (hook := self._hook(tap)) is not None]

    def pop(self) -> dict[str, Captured]:
        """Hand over what was captured since the last time, by tap name; taps that did not run are missing.

        Calls that returned another number of features than the last one are left out.
        """
        self.mask = None
        captured = {}
        for name, calls in self._calls.items():
            alike = [call for call in calls if call.rows.shape[1] == calls[-1].rows.shape[1]]
            if alike:
                captured[name] = _join(alike)
            calls.clear()
        return captured

    def remove(self) -> None:
        """Stop listening and forget; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.armed = False
        self.pop()

    def capture(self, hook: TapHook, value: Any) -> None:
        """Copy rows of what a layer has returned; for hooks."""
        if not self.armed or hook.failed or is_to_be_ignored():
            return
        try:
            with torch.no_grad():
                self._calls[hook.name].append(self._read(hook, value))
        except Exception as error:
            hook.failed = not isinstance(error, NoFeaturesError)  # the next call may return another thing
            self._leave_out(hook.name, error)

    def _hook(self, tap: Tap) -> TapHook | None:
        try:
            return TapHook(self, tap)
        except Exception as error:  # a ScriptModule refuses hooks
            self._leave_out(tap.name, error)
            return None

    def _read(self, hook: TapHook, value: Any) -> _Call:
        features = find_features(value)
        if features is None:
            raise NoFeaturesError(f"no floating-point numbers to read in {_describe(value)}")
        if self.position is not None:
            found = token_at(features, self.mask, self.position)
            if found is None:
                raise NoFeaturesError(f"no sequences of one length in {_describe(value)}")
            rows: Tensor | None = as_rows(found[0])
            mask: Tensor | None = found[1]
        elif self.sequences and is_tokens(features, hook.axis):
            return self._read_sequences(hook, features)
        else:
            if hook.axis.is_doubtful(features) and not self.doubted:
                self._doubt(hook, features)
            rows, mask = as_rows(features, hook.axis, self.positions), as_row_mask(features, self.mask, hook.axis)
        if rows is None or not rows.shape[1]:
            raise NoFeaturesError(f"no features in {_describe(value)}")
        limit = self._limit(hook, rows.shape[1])
        views = self._views(hook, features, mask) if self.views else ()
        kept = evenly(rows.detach(), limit), mask if mask is None else evenly(mask, limit)
        return _Call(*kept, rows.shape[0], views=views)

    def _views(self, hook: TapHook, features: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """A call's samples, one row each, and of a first call also those of its halves; of the first two calls only.

        Tokens and places are averaged: the same places of two samples resemble each other, and are no views.
        """
        earlier = len(self._calls[hook.name])
        rows = None if earlier > 1 or features.is_nested else as_rows(features.detach(), hook.axis)
        if rows is None or not len(features) or len(rows) % len(features):
            return ()
        if len(rows) > len(features):
            shape = (len(features), -1, rows.shape[1])
            tokens = rows.reshape(shape).to(torch.promote_types(rows.dtype, torch.float32))
            counts = torch.ones_like(tokens[..., :1]) if mask is None else mask.view(*tokens.shape[:2], 1).to(tokens)
            rows = (tokens.nan_to_num() * counts).sum(dim=1) / counts.sum(dim=1).clamp_min(1)
        halves = not earlier and len(rows) % 2 == 0 and (self.halved is None or hook.name in self.halved)
        return tuple(evenly(part, self.views) for part in (rows, *(rows.chunk(2) if halves else ())))

    def _read_sequences(self, hook: TapHook, features: Tensor) -> _Call:
        count, length, width = features.shape
        picked = evenly(torch.arange(count, device=features.device), max(self._limit(hook, width) // max(length, 1), 1))
        rows = as_rows(features.index_select(0, picked))
        if rows is None or not width:
            raise NoFeaturesError(f"no features in {_describe(features)}")
        fits = self.mask is not None and self.mask.shape == features.shape[:2]
        mask = self.mask.index_select(0, picked).flatten().bool() if fits and self.mask is not None else None
        return _Call(rows.detach(), mask, count * length, picked.repeat_interleave(length), count)

    def _limit(self, hook: TapHook, width: int) -> int:
        return self.limits.get(hook.name) or self.limit or min(4 * width, 1024)

    def _leave_out(self, name: str, error: Exception) -> None:
        self.left_out[name] = str(error)
        self.containment.catch(f"reading layer `{name}`", "what fails is left out", error)

    def _doubt(self, hook: TapHook, maps: Tensor) -> None:
        """Warn once of all layers in doubt, when one of them is again: after its first batch it may be left out."""
        again = hook.name in self._doubts
        read = "(N, C, *)" if hook.axis.is_first(maps) else "(N, *, C)"
        self._doubts[hook.name] = f"`{hook.name}` {tuple(maps.shape)} read as {read}"
        if again:
            self.doubted = True
            more = f" and {len(self._doubts) - NAMED} more" if len(self._doubts) > NAMED else ""
            rank_zero_warn(
                f"`{self.containment.owner}`: nothing tells which axis of these outputs holds the channels:"
                f" {', '.join(list(self._doubts.values())[:NAMED])}{more}. If that is wrong, watch layers that end in a"
                " convolution, a norm or a linear map."
            )


class NoFeaturesError(TypeError):
    """What a layer has returned cannot be read."""


class _Call(NamedTuple):
    rows: Tensor
    mask: Tensor | None
    returned: int
    sequences: Tensor | None = None
    total: int = 0  # sequences, of which some are here
    views: tuple[Tensor, ...] = ()


def _join(calls: Sequence[_Call]) -> Captured:
    masks = [call.rows.new_ones(len(call.rows), dtype=torch.bool) if call.mask is None else call.mask for call in calls]
    ids, start = [], 0
    for call in calls:
        if call.sequences is not None:
            ids.append(call.sequences + start)
        start += call.total
    return Captured(
        _cat([call.rows for call in calls]),
        _cat(masks),
        sum(call.returned for call in calls),
        tuple(len(call.rows) for call in calls),
        _cat(ids) if len(ids) == len(calls) else None,
        _two_views(calls),
    )


def _two_views(calls: Sequence[_Call]) -> Tensor | None:
    if len(calls) > 1 and calls[0].returned == calls[1].returned and calls[0].views and calls[1].views:
        return torch.stack([calls[0].views[0], calls[1].views[0]])
    return torch.stack(calls[0].views[1:]) if len(calls) == 1 and len(calls[0].views) > 1 else None


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    shape = "nested" if value.is_nested else f"of shape {tuple(value.shape)}"
    return f"a tensor {shape}, {value.dtype}, {value.layout}".replace("torch.", "")
