"""Moment hooks: all numbers that chosen layers return in one training step, summed up while they pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_collapse.monitoring.tap_hook import TapHook
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import max_over_processes
from lightning_collapse.utilities.features import as_row_mask, as_rows, find_features
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import Tap, is_to_be_ignored


class StreamMoments(Protocol):
    """Sums over a stream of rows, such as :class:`~lightning_collapse.spectral.entry_moments.EntryMoments`."""

    squares: Tensor

    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add rows ``(N, D)``."""
        ...


M = TypeVar("M", bound=StreamMoments)


class MomentHooks(HookOwner, Generic[M]):
    """Forward hooks that add up what layers return while ``armed``, and cost one ``if`` while not.

    Every call counts, except activation checkpointing's recomputation in the backward pass, and every number of it: of
    a subsample the largest magnitude would be too small. Every position of a map is a row. No activation and no graph
    is kept, and nothing waits for the device. A compiled model stays one graph. What fails inside a hook is one warning
    that names the layer.

    Args:
        taps: Where to listen.
        make: From a width and a device to sums that are empty.
        reduce: Collective, from the sums of this process to those of all.
        containment: Where failures are told, in the name of its owner.

    Attributes:
        armed: Whether to add up now.
        mask: Padding mask ``(N, L)`` of the running batch; tokens that are padding do not count.
        left_out: Why nothing is read of a tap, by name, of those that have failed.
        facts: Of each layer one positive number, see :meth:`note`.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        make: Callable[[int, torch.device], M],
        reduce: Callable[[Sequence[M]], list[M]],
        containment: Containment | None = None,
    ) -> None:
        self.armed = False
        self.mask: Tensor | None = None
        self.containment = containment or Containment(type(self).__name__)
        self.left_out: dict[str, str] = {}
        self.facts: dict[str, float] = {}
        self._make, self._reduce = make, reduce
        self._names = [tap.name for tap in taps]
        self._moments: dict[str, M] = {}
        self._hooks = [hook for tap in taps if (hook := self._hook(tap)) is not None]

    def begin(self) -> None:
        """Forget what was added up: a step that may end in a point begins."""
        self._moments.clear()
        self.facts.clear()

    def pop(self, device: torch.device) -> dict[str, M]:
        """Hand over the statistics of all processes since the last time, by layer; those that never ran are missing.

        Collective: every process calls it at a point, where it may wait for the others.
        """
        self.armed, self.mask = False, None
        own, self._moments = self._moments, {}
        widths = [len(own[name].squares) if name in own else 0 for name in self._names]
        known = [self.facts.get(name, 0.0) for name in self._names]
        agreed = max_over_processes([*widths, *known], device)
        called = {name: int(width) for name, width in zip(self._names, agreed, strict=False) if width}
        self.facts = {name: top for name, top in zip(self._names, agreed[len(widths) :], strict=True) if top}
        if not called:
            return {}
        # what another process has called and this one has not, or in another width
        mine = [
            own[name] if name in own and len(own[name].squares) == width else self._make(width, device)
            for name, width in called.items()
        ]
        return dict(zip(called, self._reduce(mine), strict=True))

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

    def note(self, hook: TapHook, features: Tensor) -> None:
        """Take note of what a layer has returned besides its numbers, in :attr:`facts`; processes agree on the largest.

        At a point they are those of the step that ends in it.
        """

    @torch.no_grad()
    def _add(self, hook: TapHook, value: Any) -> None:
        features = find_features(value)
        if features is None:
            raise TypeError(f"no floating-point numbers to read in a {type(value).__name__}")
        self.add_up(hook.name, hook, features)
        self.note(hook, features)

    def add_up(self, name: str, hook: TapHook, features: Tensor) -> None:
        """Add the rows of a tensor to the sums of a name."""
        rows = as_rows(features.detach(), hook.axis, positions=True)
        if rows is None or not rows.shape[1]:
            raise TypeError("no floating-point numbers to read in a Tensor")
        moments = self._moments.get(name)
        if moments is None or len(moments.squares) != rows.shape[1]:  # a layer that changes its width: the last counts
            moments = self._moments[name] = self._make(rows.shape[1], rows.device)
        moments.update(rows, as_row_mask(features, self.mask, hook.axis))

    def _hook(self, tap: Tap) -> TapHook | None:
        try:
            return TapHook(self, tap)
        except Exception as error:  # a ScriptModule refuses hooks
            self._leave_out(tap.name, error)
            return None

    def _leave_out(self, name: str, error: Exception) -> None:
        self.left_out[name] = str(error)
        self.containment.catch(f"reading layer `{name}`", "it is left out from now on", error)
