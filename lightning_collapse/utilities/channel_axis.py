"""Channel axis of feature maps: ``(N, C, H, W)`` or ``(N, H, W, C)``, judged by the layer that made them."""

from __future__ import annotations

from copy import copy
from typing import Literal

from torch import Tensor, nn

from lightning_collapse.utilities.made_by import layout_of
from lightning_collapse.utilities.module_tree import innermost, weighted_layers
from lightning_collapse.utilities.modules import is_channels_first

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OUT = ("out_features", "out_channels", "num_features", "num_channels", "embed_dim", "embedding_dim")
_IN = ("in_features", "in_channels", "num_features", "num_channels", "embed_dim")
_FIRST = {
    f"torch.nn.modules.{file}"
    for file in ("conv", "batchnorm", "instancenorm", "pooling", "adaptive", "pixelshuffle", "upsampling", "padding")
}


class ChannelAxis:
    """Tells where the channels of a layer's maps are.

    The last layer inside that has a width (``Linear``, a convolution, a norm) knows how many channels there are: the
    axis of that size is theirs. Where both or none have it, convolutions, batch norms and pooling put channels first;
    where both have the size that a ``Linear`` or ``LayerNorm`` says, channels come first if it holds convolutions too.
    Without any such layer (an activation on its own) the operation that made the maps tells, by their autograd graph;
    without a graph square maps do, and else channels are taken to come first.

    Args:
        module: The layer.
        side: Whether its output is meant or its input: there the first layer inside counts.

    Example:
        >>> import torch
        >>> axis = ChannelAxis(nn.LayerNorm(96))
        >>> axis.is_first(torch.zeros(2, 7, 7, 96)), axis.is_first(torch.zeros(2, 96, 7, 7))
        (False, True)
    """

    def __init__(self, module: nn.Module, side: Literal["output", "input"] = "output") -> None:
        self._known: bool | None = None
        self._conventional = is_channels_first(module, side)
        layers = list(innermost(module))
        self._convolves = any(_is_first(layer) for layer in layers)
        for layer in layers if side == "input" else reversed(layers):
            self._width = _width(layer, _IN if side == "input" else _OUT)
            self._first = _is_first(layer)
            if self._width or self._first:
                return
        self._width, self._first = 0, False

    def is_first(self, maps: Tensor) -> bool:
        """Whether ``maps``, of three or more dimensions, are ``(N, C, *)``; three dimensions may be tokens instead."""
        if self._known is not None and maps.ndim > 3:
            return self._known
        of_first, of_last = maps.shape[1] == self._width, maps.shape[-1] == self._width
        if of_first != of_last:
            return of_first
        if maps.ndim == 3:
            return self._conventional
        if self._first or of_first:
            return self._first or self._convolves
        self._learn(maps)
        return not _looks_last(maps) if self._known is None else self._known

    def of_parts(self, maps: Tensor) -> ChannelAxis:
        """The axis of what was cut out of these maps, and has other sizes: it is where theirs is.

        Example:
            >>> import torch
            >>> maps = nn.Conv2d(3, 8, 1)(torch.zeros(2, 3, 8, 8))
            >>> ChannelAxis(nn.Conv2d(3, 8, 1)).of_parts(maps).is_first(maps[:, :4])
            True
        """
        parts = copy(self)
        parts._known = self.is_first(maps) if maps.ndim > 3 else None
        return parts

    def is_doubtful(self, maps: Tensor) -> bool:
        """Whether :meth:`is_first` had to guess: no layer tells, and the maps are not square."""
        if maps.is_nested or maps.ndim < 4 or self._first or self._width in (maps.shape[1], maps.shape[-1]):
            return False
        self._learn(maps)
        if self._known is not None:
            return False
        return len(set(maps.shape[2:])) > 1

    def _learn(self, maps: Tensor) -> None:
        """Ask the graph where the channels are; once it has told, that holds."""
        if self._known is None and (layout := layout_of(maps)) is not None:
            self._known = layout == "first"


def ends_in_maps(root: nn.Module) -> bool:
    """Whether the last product of a model is a convolution: it tells something of every position, not of the whole.

    Such are models of segmentation and of denoising, autoencoders and detectors; their features vary from place to
    place, and the mean over all places says little of them.

    Example:
        >>> ends_in_maps(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.BatchNorm2d(1)))
        True
        >>> ends_in_maps(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 1)))
        False
    """
    products = [layer for _, layer in weighted_layers(root) if isinstance(layer, (nn.Linear, *_CONVOLUTIONS))]
    return bool(products) and isinstance(products[-1], _CONVOLUTIONS)


def _is_first(layer: nn.Module) -> bool:
    return any(cls.__module__ in _FIRST for cls in type(layer).__mro__)


def _looks_last(maps: Tensor) -> bool:
    return len(set(maps.shape[1:-1])) == 1 and maps.shape[1] != maps.shape[-1]


def _width(layer: nn.Module, names: tuple[str, ...]) -> int:
    """Features that a layer returns, or receives; 0 if it does not say."""
    if type(layer).__module__ == "torch.nn.modules.activation" and not isinstance(layer, nn.MultiheadAttention):
        return 0  # one weight of `PReLU` is not one feature
    for name in names:
        if isinstance(size := getattr(layer, name, None), int):
            return size
    shape = getattr(layer, "normalized_shape", None)
    if isinstance(shape, tuple | list):
        return int(shape[0]) if len(shape) == 1 else 0
    weight = getattr(layer, "weight", None)
    known = isinstance(weight, Tensor) and not nn.parameter.is_lazy(weight) and weight.ndim == 1
    return len(weight) if known and isinstance(weight, Tensor) else 0
