"""Hooked monitors: what those share that have hooks of their own, armed within the training step."""

from __future__ import annotations

from typing import Generic, TypeVar

from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Monitor
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.utilities.hooks import HookOwner

H = TypeVar("H", bound=HookOwner)


class HookedMonitor(Monitor, Generic[H]):
    """Listens with ``_hooks`` in the steps for which ``_scope`` arms them; ``start`` of a subclass makes both."""

    _hooks: H | None = None
    _scope: StepScope | None = None

    @property
    @override
    def listeners(self) -> list[HookOwner]:
        return [] if self._hooks is None else [self._hooks]

    @override
    def stop(self) -> None:
        for owner in (self._hooks, self._scope):
            if owner is not None:
                owner.remove()
        self._hooks = self._scope = None
