"""Activation statistics: all numbers that chosen layers return in one training step, summed up while they pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.monitoring.tap_hook import TapHook
from lightning_collapse.spectral.entry_moments import EntryMoments, reduce_entries
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import max_over_processes
from lightning_collapse.utilities.features import as_row_mask, as_rows, find_features
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import Tap, is_to_be_ignored


class ActivationHooks(HookOwner):
    """Forward hooks that add up what layers return while ``armed``, and cost one ``if`` while not.

    Every call counts, except activation checkpointing's recomputation in the backward pass, and every number of it: of
    a subsample the largest magnitude would be too small. Every position of a map is a row. No activation and no graph
    is kept, and nothing waits for the device. A compiled model stays one graph. What fails inside a hook is one warning
    that names the layer.

    Args:
        taps: Where to listen.
        containment: Where failures are told, in the name of its owner.

    Attributes:
        armed: Whether to add up now.
        mask: Padding mask ``(N, L)`` of the running batch; tokens that are padding do not count.
        left_out: Why nothing is read of a tap, by name, of those that have failed.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> hooks = ActivationHooks([Tap("layer", layer)])
        >>> hooks.armed = True
        >>> _ = layer(torch.ones(4, 3)), layer(torch.ones(2, 3))
        >>> hooks.pop(torch.device("cpu"))["layer"].entries
        tensor(12., dtype=torch.float64)
        >>> hooks.remove()
    """

    def __init__(self, taps: Sequence[Tap], containment: Containment | None = None) -> None:
        self.armed = False
        self.mask: Tensor | None = None
        self.containment = containment or Containment(type(self).__name__)
        self.left_out: dict[str, str] = {}
        self.formats: dict[str, float] = {}
        """Of each layer the largest number of the format of its latest output."""
        self._names = [tap.name for tap in taps]
        self._moments: dict[str, EntryMoments] = {}
        self._hooks = [hook for tap in taps if (hook := self._hook(tap)) is not None]

    def begin(self) -> None:
        """Forget what was added up: a step that may end in a point begins."""
        self._moments.clear()

    def pop(self, device: torch.device) -> dict[str, EntryMoments]:
        """Hand over the statistics of all processes since the last time, by layer; those that never ran are missing.

        Collective: every process calls it at a point, where it may wait for the others.
        """
        self.armed, self.mask = False, None
        own, self._moments = self._moments, {}
        widths = [len(own[name].squares) if name in own else 0 for name in self._names]
        known = [self.formats.get(name, 0.0) for name in self._names]
        agreed = max_over_processes([*widths, *known], device)
        called = {name: int(width) for name, width in zip(self._names, agreed, strict=False) if width}
        self.formats = {name: top for name, top in zip(self._names, agreed[len(widths) :], strict=True) if top}
        if not called:
            return {}
        # what another process has called and this one has not, or in another width
        mine = [
            own[name] if name in own and len(own[name].squares) == width else EntryMoments(width, device)
            for name, width in called.items()
        ]
        return dict(zip(called, reduce_entries(mine), strict=True))

    def remove(self) -> None:
        """Stop listening and forget; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.armed, self.mask = False, None
        self._moments.clear()

    def capture(self, hook: TapHook, value: Any) -> None:
        """Add up what a layer has returned; for hooks."""
        if not self.armed or hook.failed or is_to_be_ignored():
            return
        try:
            self._add(hook, value)
        except Exception as error:
            hook.failed = True
            self._leave_out(hook.name, error)

    @torch.no_grad()
    def _add(self, hook: TapHook, value: Any) -> None:
        features = find_features(value)
        rows = None if features is None else as_rows(features.detach(), hook.axis, positions=True)
        if features is None or rows is None or not rows.shape[1]:
            raise TypeError(f"no floating-point numbers to read in a {type(value).__name__}")
        moments = self._moments.get(hook.name)
        if moments is None or len(moments.squares) != rows.shape[1]:  # a layer that changes its width: the last counts
            moments = self._moments[hook.name] = EntryMoments(rows.shape[1], rows.device)
        moments.update(rows, as_row_mask(features, self.mask, hook.axis))
        if not features.is_complex() and features.element_size() > 1:  # numbers of 8 bits have a scale elsewhere
            self.formats[hook.name] = torch.finfo(features.dtype).max

    def _hook(self, tap: Tap) -> TapHook | None:
        try:
            return TapHook(self, tap)
        except Exception as error:  # a ScriptModule refuses hooks
            self._leave_out(tap.name, error)
            return None

    def _leave_out(self, name: str, error: Exception) -> None:
        self.left_out[name] = str(error)
        self.containment.catch(f"reading layer `{name}`", "it is left out from now on", error)
