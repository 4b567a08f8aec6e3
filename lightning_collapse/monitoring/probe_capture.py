"""Probe capture: what layers receive and return on fixed samples, and how one output depends on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_collapse.monitoring.autograd_graph import children, kind
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import in_backward

MAX_SAMPLES = 128
"""Rows that stand for samples where a layer's input cannot be cut into those of the probe."""


_VIEWS = ("View", "UnsafeView")


class Probed(NamedTuple):
    """Of one layer, all its calls; positions of a sample stand one behind the other.

    Attributes:
        inputs: Shape ``(b, T, i)``.
        outputs: Shape ``(b, T, o)``.
        gradients: Of the output along one direction with respect to ``outputs``; ``None`` where none came.
    """

    inputs: Tensor
    outputs: Tensor
    gradients: Tensor | None


class ProbeCapture(HookOwner):
    """Hooks for one pass over a probe; :meth:`backward` within the pass brings gradients, :meth:`pop` all of it.

    The output is that of the call that came last, along one random direction that is always the same. Gradients are
    taken by hooks on tensors, so that what is done in place behind a layer does not matter, and reach no ``.grad``.

    Args:
        layers: By name.
        samples: How many the probe has.
        others: Layers whose output may come last, too.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> capture = ProbeCapture({"0": net[0], "2": net[2]}, samples=8)
        >>> _ = net(torch.ones(8, 4))
        >>> capture.backward()
        >>> capture.remove()
        >>> {name: tuple(found.gradients.shape) for name, found in capture.pop().items()}
        {'0': (8, 1, 3), '2': (8, 1, 2)}
    """

    def __init__(self, layers: Mapping[str, nn.Module], samples: int, others: Sequence[nn.Module] = ()) -> None:
        self._samples, self._layers = samples, layers
        self._calls: dict[str, list[list[Tensor | None]]] = {name: [] for name in layers}
        self._last: Tensor | None = None
        named = [*layers.items(), *(("", layer) for layer in others if layer not in layers.values())]
        self._hooks = [ModuleHook(layer, function=partial(self._take, name)) for name, layer in named]

    def backward(self) -> None:
        """Bring the gradients of what ran; nothing where nothing can be differentiated."""
        last, self._last = self._last, None
        if last is None or not last.requires_grad:
            return
        direction = torch.randn(last.shape[1:], generator=torch.Generator().manual_seed(0))
        weights = [p for layer in self._layers.values() for p in layer.parameters() if p.requires_grad]
        # of weights, and not of outputs: those may have been changed in place
        torch.autograd.grad((last * direction.to(last)).sum(), weights, allow_unused=True)

    def pop(self) -> dict[str, Probed]:
        """What was captured, by layer; those that did not run are missing."""
        found = {}
        for name, calls in self._calls.items():
            alike = [call for call in calls if [_kind(part) for part in call] == [_kind(part) for part in calls[-1]]]
            if alike:
                parts = [self._join(part) for part in zip(*alike, strict=True)]
                found[name] = Probed(parts[0], parts[1], parts[2] if alike[-1][2] is not None else None)
        self._calls = {name: [] for name in self._calls}
        return found

    def _take(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensors = [*args[:1], output]
        if in_backward() or not all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 for x in tensors):
            return
        if len(tensors) < 2 or not output.numel() or output.is_nested:
            return
        self._last = output
        if name not in self._calls:
            return
        node, call = output.grad_fn, [args[0].detach(), output.detach().clone(), None]
        self._calls[name].append(call)
        if node is not None:
            # of the product, and not of a view of it: what is done to that in place would leave its hooks behind
            while kind(node) in _VIEWS:
                node = children(node)[0]
            node.register_prehook(partial(_note, call, output.shape))

    def _join(self, calls: Sequence[Tensor | None]) -> Tensor:
        parts = [self._per_sample(part) for part in calls if part is not None]
        return torch.cat(parts, dim=1) if parts else torch.empty(0)

    def _per_sample(self, part: Tensor) -> Tensor:
        """Shape ``(b, T, width)``; of maps ``(N, C, *)`` all is one row."""
        rows = part.flatten(1).unsqueeze(1) if part.ndim > 3 else part if part.ndim == 3 else part.unsqueeze(1)
        if len(rows) % self._samples:
            return evenly(rows.flatten(0, 1), MAX_SAMPLES).unsqueeze(1)
        return rows.reshape(self._samples, -1, rows.shape[-1])


def _note(call: list[Tensor | None], shape: torch.Size, gradients: Sequence[Tensor | None]) -> None:
    if gradients[0] is not None:
        call[2] = gradients[0].detach().reshape(shape)


def _kind(part: Tensor | None) -> Any:
    return None if part is None else (part.ndim, part.shape[-1])
