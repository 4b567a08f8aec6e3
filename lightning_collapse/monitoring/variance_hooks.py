"""Variance hooks: moments of what chosen layers return, and of the gradient that comes back to it, in one step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.monitoring.moment_hooks import MomentHooks
from lightning_collapse.monitoring.tap_hook import TapHook
from lightning_collapse.spectral.feature_moments import FeatureMoments, reduce_features
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.features import find_features
from lightning_collapse.utilities.gradients import follow_gradient
from lightning_collapse.utilities.modules import Tap, in_backward

GRADIENT = "gradient of "
"""What the name of a tap begins with that the moments of its gradient have."""


class VarianceHooks(MomentHooks[FeatureMoments]):
    """Adds up values and gradients; :attr:`facts` is the place of a layer in the order of the first calls of the step.

    A gradient is read by a hook on the tensor that was returned, which leaves the graph as it is and goes with it.
    Under reentrant activation checkpointing that is the tensor of the recomputation. Inside compiled code no gradient
    can be read, and values alone are.

    Args:
        taps: Where to listen.
        containment: Where failures are told, in the name of its owner.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> hooks = VarianceHooks([Tap("layer", layer)])
        >>> hooks.begin()
        >>> hooks.armed = True
        >>> layer(torch.randn(4, 3)).square().sum().backward()
        >>> list(hooks.pop(torch.device("cpu")))
        ['layer', 'gradient of layer']
        >>> hooks.remove()
    """

    def __init__(self, taps: Sequence[Tap], containment: Containment | None = None) -> None:
        self._open, self._armed, self._step = False, False, 0
        super().__init__(taps, FeatureMoments, reduce_features, containment)
        self._names += [GRADIENT + name for name in self._names]

    @property
    def armed(self) -> bool:
        """Whether calls count: those of the step, and in its backward pass those that compute a part of it again."""
        return self._armed or (self._open and in_backward())

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._armed = armed

    def begin(self) -> None:
        """Forget what was added up: a step that may end in a point begins."""
        super().begin()
        self._open, self._step = True, self._step + 1

    def pop(self, device: torch.device) -> dict[str, FeatureMoments]:
        """Hand over the statistics of all processes, see the base. Collective."""
        self._open = False
        return super().pop(device)

    def remove(self) -> None:
        """Stop listening and forget; may be called twice."""
        self._open = False
        super().remove()

    def capture(self, hook: TapHook, value: Any) -> None:
        """Add up what a layer has returned, and follow its gradient; for hooks."""
        if not in_backward():
            super().capture(hook, value)
        elif self._open and not hook.failed:
            features = find_features(value)
            if features is not None:
                self._follow(hook, features)

    def note(self, hook: TapHook, features: Tensor) -> None:
        """Note the place in the order, and follow the gradient."""
        self.facts.setdefault(hook.name, len(self.facts) + 1)
        self._follow(hook, features)

    def _follow(self, hook: TapHook, features: Tensor) -> None:
        if features.requires_grad:
            follow_gradient(features, partial(self._take, hook, self._step))

    @torch.no_grad()
    def _take(self, hook: TapHook, step: int, gradient: Tensor) -> None:
        if not self._open or step != self._step or hook.failed:  # a graph may outlive the step
            return
        try:
            self.add_up(GRADIENT + hook.name, hook, gradient)
        except Exception as error:
            hook.failed = True
            self._leave_out(hook.name, error)
