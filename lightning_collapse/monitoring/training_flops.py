"""What one training step costs, counted from shapes alone: the measure of what monitoring may cost."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_collapse.utilities.modules import in_backward, is_compiled, weighted_layers


class TrainingFlops:
    """Counts the floating-point operations of forward and backward through every layer that holds a weight.

    Six per weight and position (two forward, four backward); attention scores, normalisation and activations are left
    out, so the count is a floor. It reads shapes only: no tensor is touched, nothing leaves the device, and it is the
    same on every run. In a compiled model hooks that come and go would cost compilations: nothing is counted there.

    Args:
        root: The model to count.

    Attributes:
        total: Operations so far.
    """

    def __init__(self, root: nn.Module) -> None:
        self.total = 0
        self._handles: list[RemovableHandle] = []
        if not is_compiled(root):
            self._handles = [module.register_forward_hook(self._count) for _, module in weighted_layers(root)]

    def remove(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _count(self, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward():
            return
        transposed = getattr(module, "transposed", False)  # there every position of the input meets every weight
        output = args[0] if transposed else output
        output = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(output, Tensor) or output.ndim < 2 or not output.numel():
            return
        for weight in module.parameters(recurse=True):
            if weight.ndim >= 2:
                channels = output.shape[1 if weight.ndim > 2 else -1]
                self.total += 6 * weight.numel() * output.numel() // channels
