"""Tap hooks: one forward hook for what a layer returns or receives, eager or out of a compiled graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_collapse.monitoring.graph_call import GraphCall
from lightning_collapse.utilities.channel_axis import ChannelAxis
from lightning_collapse.utilities.features import as_rows, find_features
from lightning_collapse.utilities.hooks import ModuleHook
from lightning_collapse.utilities.modules import Tap


class TapOwner(Protocol):
    """What the hooks of some taps belong to."""

    armed: bool

    def capture(self, hook: TapHook, value: Any) -> None:
        """Take what a layer has returned or received."""
        ...


class TapHook(ModuleHook):
    """Hands what passes a tap to its owner while that is armed; a compiled model stays one graph.

    Args:
        owner: Of the hook.
        tap: Where to listen.

    Attributes:
        failed: Whether it is to be left alone; for the owner.
        axis: Which axis of what passes holds the channels.
    """

    def __init__(self, owner: TapOwner, tap: Tap) -> None:
        self.owner, self.name, self.before = owner, tap.name, tap.side == "input"
        self.failed = False
        self.axis = ChannelAxis(tap.module, tap.side)
        self.call = GraphCall(self._receive)
        super().__init__(tap.module, self.before)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """Hand on what passes."""
        value = (*args, *value.values()) if self.before else value
        if torch.compiler.is_compiling():
            self.call([_in_graph(value)])
        elif self.owner.armed:
            self.owner.capture(self, value)

    def _receive(self, tensors: Sequence[Tensor | None], note: str) -> None:
        self.owner.capture(self, tensors[0])


def _in_graph(value: Any) -> Tensor | None:
    """The features to hand out of a compiled graph, as a plain tensor; traced by the compiler."""
    features = find_features(value)
    if features is not None and features.is_nested:
        features = as_rows(features) if features.ndim == 3 else None
    if features is None or type(features) not in (Tensor, nn.Parameter):
        return None
    return features.detach()
