"""Made by: which operation of the autograd graph has laid out the axes of a tensor."""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import Tensor

NODES = 24
"""So many nodes are looked at: an activation, a residual sum, a dropout and the casts of autocast lie between."""
_OPERATION = re.compile(r"Backward\d*$")
_FIRST = re.compile(r"Convolution|BatchNorm|GroupNorm|Pool[23]d|MaxPool|Upsample|PixelShuffle")
_LAST = {"Addmm", "Mm", "Linear"}
_ALIKE = re.compile(
    r"Add|Sub|Mul|Div|Neg|Clone|ToCopy|Copy|Contiguous|View|UnsafeView|Dropout|NativeDropout|Threshold|\w*elu\w*|Silu"
    r"|Mish|Tanh|Sigmoid|LogSigmoid|Softplus|Hardswish|Hardsigmoid|Hardtanh|Hardshrink|Softshrink|Glu|Pow|Exp|Sin|Cos"
    r"|Alias|Abs|Square|CopySlices|AsStrided",
    re.IGNORECASE,
)


def layout_of(maps: Tensor) -> Literal["first", "last"] | None:
    """Whether channels are the second axis or the last one, by the product or norm that maps come from.

    Only operations that leave axes where they are lie between; ``None`` where there is no graph, or no such product.
    Reads the graph, and keeps nothing of it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> x = torch.zeros(2, 3, 8, 6)
        >>> layout_of(torch.relu(nn.Conv2d(3, 6, 1)(x))), layout_of(torch.relu(nn.Linear(6, 6)(x))), layout_of(x)
        ('first', 'last', None)
    """
    waiting: list[Any] = [maps.grad_fn]
    hidden = False  # an operation in place on a view does not say which view it was
    for _ in range(NODES):
        if not waiting:
            return None
        node = waiting.pop(0)
        operation = "" if node is None else _OPERATION.sub("", type(node).__name__)
        hidden |= operation == "AsStrided"
        if _FIRST.search(operation):
            return None if hidden else "first"
        if operation in _LAST or (operation == "NativeLayerNorm" and _is_of_one_axis(node)):
            return "last" if not hidden or maps.is_contiguous() else None
        if _ALIKE.fullmatch(operation):
            waiting += [following for following, _ in node.next_functions]
    return None


def _is_of_one_axis(norm: Any) -> bool:
    return len(getattr(norm, "_saved_normalized_shape", ())) == 1
