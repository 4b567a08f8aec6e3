"""Training FLOPs: what one training step costs, counted from shapes alone; the measure of what monitoring may."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import in_backward, is_compiled, weighted_layers


class TrainingFlops(HookOwner):
    """Counts the floating-point operations of forward and backward through every layer that holds a weight.

    Six per weight and position (two forward, four backward); attention scores, normalisation and activations are left
    out, so the count is a floor. It reads shapes only: no tensor is touched, nothing leaves the device, and it is the
    same on every run. In a compiled model hooks that come and go would cost compilations: nothing is counted there.

    Args:
        root: The model to count.
        containment: Where failures are told, in the name of its owner.

    Attributes:
        total: Operations so far.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> flops = TrainingFlops(net)
        >>> _ = net(torch.ones(8, 4))
        >>> flops.total
        576
        >>> flops.remove()
    """

    def __init__(self, root: nn.Module, containment: Containment | None = None) -> None:
        self.total = 0
        self.containment = containment or Containment(type(self).__name__)
        self._hooks: list[_Hook] = []
        if not is_compiled(root):
            layers = [(name, layer) for name, layer in weighted_layers(root) if not isinstance(layer, ScriptModule)]
            self._hooks = [_Hook(self, name, layer) for name, layer in layers]

    def remove(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        """Add what one call of a layer costs; for hooks."""
        transposed = getattr(module, "transposed", False)  # there every position of the input meets every weight
        output = args[0] if transposed else output
        output = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(output, Tensor) or output.ndim < 2 or not output.numel():
            return
        for weight in module.parameters(recurse=True):
            if weight.ndim >= 2:
                channels = output.size(1 if weight.ndim > 2 else -1)  # a nested tensor has no shape
                self.total += 6 * weight.numel() * output.numel() // channels


class _Hook(ModuleHook):
    def __init__(self, owner: TrainingFlops, name: str, layer: nn.Module) -> None:
        self.owner, self.name = owner, name
        super().__init__(layer)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if torch.compiler.is_compiling() or in_backward():
            return
        try:
            self.owner.count(module, args, value)
        except Exception as error:
            self.owner.containment.catch(f"counting operations of `{self.name}`", "they are not counted", error)
