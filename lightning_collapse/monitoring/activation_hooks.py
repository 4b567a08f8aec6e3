"""Activation statistics: outliers among all numbers that chosen layers return in one training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.monitoring.moment_hooks import MomentHooks
from lightning_collapse.monitoring.tap_hook import TapHook
from lightning_collapse.spectral.entry_moments import EntryMoments, reduce_entries
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.modules import Tap


class ActivationHooks(MomentHooks[EntryMoments]):
    """Sums up what outliers are told by; :attr:`facts` is the largest number of the format of a layer's latest output.

    Args:
        taps: Where to listen.
        containment: Where failures are told, in the name of its owner.

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
        super().__init__(taps, EntryMoments, reduce_entries, containment)

    def note(self, hook: TapHook, features: Tensor) -> None:
        """Note the format."""
        if not features.is_complex() and features.element_size() > 1:  # numbers of 8 bits have a scale elsewhere
            self.facts[hook.name] = torch.finfo(features.dtype).max
