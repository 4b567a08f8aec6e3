"""Where the channels of maps are, by the layer that made them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.utilities.channel_axis import ChannelAxis


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Scale(nn.Module):
    """A norm of one's own: a weight for each feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def convnext(width: int) -> nn.Module:
    """Channels first outside, last inside."""
    return Residual(
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        Permute(0, 2, 3, 1),
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width),
        nn.GELU(),
        nn.Linear(4 * width, width),
        Permute(0, 3, 1, 2),
    )


def window(width: int) -> nn.Module:
    """Channels last, as in Swin and SAM."""
    return Residual(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(0.0))


FIRST = {
    "conv": (nn.Conv2d(3, 6, 1), (2, 3, 7, 7)),
    "conv, norm, relu": (nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()), (2, 3, 7, 5)),
    "pooling": (nn.MaxPool2d(2), (2, 3, 8, 6)),
    "shuffle": (nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2)), (2, 3, 5, 5)),
    "convnext": (convnext(6), (2, 6, 7, 7)),
    "convnext, square cube": (convnext(8), (2, 8, 8, 8)),
    "conv, square cube": (nn.Conv2d(8, 8, 1), (2, 8, 8, 8)),
    "permuted output of a linear map": (nn.Sequential(nn.Linear(3, 6), Permute(0, 3, 1, 2)), (2, 7, 5, 3)),
    "group norm": (nn.GroupNorm(2, 6), (2, 6, 7, 7)),
    "relu of square maps": (nn.ReLU(), (2, 6, 7, 7)),
    "volumes": (nn.Conv3d(3, 6, 1), (2, 3, 5, 7, 4)),
    "prelu": (nn.Sequential(nn.Conv2d(3, 6, 1), nn.PReLU()), (2, 3, 7, 1)),
}
LAST = {
    "layer norm": (nn.LayerNorm(6), (2, 7, 7, 6)),
    "layer norm, square cube": (nn.LayerNorm(8), (2, 8, 8, 8)),
    "linear": (nn.Linear(3, 96), (2, 7, 5, 3)),
    "window attention": (window(6), (2, 7, 7, 6)),
    "window attention, square cube": (window(8), (2, 8, 8, 8)),
    "own norm": (nn.Sequential(window(6), Scale(6)), (2, 7, 5, 6)),
    "permuted output of a convolution": (nn.Sequential(nn.Conv2d(3, 6, 4, 4), Permute(0, 2, 3, 1)), (2, 3, 28, 28)),
    "relu of square maps": (nn.ReLU(), (2, 7, 7, 6)),
    "volumes": (nn.LayerNorm(6), (2, 3, 7, 7, 6)),
}


@pytest.mark.parametrize("kind", FIRST)
def test_channels_first(kind: str) -> None:
    layer, shape = FIRST[kind]
    assert ChannelAxis(layer).is_first(layer(torch.randn(shape)))


@pytest.mark.parametrize("kind", LAST)
def test_channels_last(kind: str) -> None:
    layer, shape = LAST[kind]
    assert not ChannelAxis(layer).is_first(layer(torch.randn(shape)))


@pytest.mark.parametrize(("layer", "shape", "first"), [
    (nn.Conv2d(3, 6, 1), (2, 3, 7, 7), True),
    (nn.Linear(3, 7), (2, 7, 7, 3), False),
    (window(6), (2, 7, 7, 6), False),
    (nn.Sequential(nn.ReLU(), nn.Linear(3, 7)), (2, 7, 5, 3), False),
])  # fmt: skip
def test_inputs_by_the_first_layer(layer: nn.Module, shape: tuple[int, ...], first: bool) -> None:
    assert ChannelAxis(layer, "input").is_first(torch.randn(shape)) is first


@pytest.mark.parametrize(
    ("layer", "shape", "first"),
    [
        (nn.Conv1d(3, 6, 1), (2, 6, 9), True),
        (nn.Sequential(nn.Conv1d(3, 6, 1), Permute(0, 2, 1)), (2, 9, 6), False),
        (nn.Sequential(nn.Conv1d(3, 6, 1), Permute(0, 2, 1), nn.LayerNorm(6), Permute(0, 2, 1)), (2, 6, 9), True),
        (nn.Linear(3, 6), (2, 9, 6), False),
        (nn.Linear(3, 6), (2, 6, 6), False),
        (nn.ReLU(), (2, 9, 6), False),
    ],
)
def test_sequences(layer: nn.Module, shape: tuple[int, ...], first: bool) -> None:
    assert ChannelAxis(layer).is_first(torch.randn(shape)) is first


@pytest.mark.parametrize(
    ("layer", "shape", "doubtful"),
    [
        (nn.ReLU(), (2, 7, 5, 6), True),
        (nn.ReLU(), (2, 7, 7, 6), True),
        (nn.ReLU(), (2, 6, 7, 7), False),
        (nn.ReLU(), (2, 6, 7), False),
        (nn.Conv2d(3, 6, 1), (2, 6, 7, 5), False),
        (nn.LayerNorm(6), (2, 7, 5, 6), False),
    ],
)
def test_doubt(layer: nn.Module, shape: Any, doubtful: bool) -> None:
    assert ChannelAxis(layer).is_doubtful(torch.randn(shape)) is doubtful


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU()])
@pytest.mark.parametrize("cast", [False, True])
def test_an_activation_alone_is_told_by_what_made_its_input(act: nn.Module, cast: bool) -> None:
    cases = [
        (nn.Linear(6, 16), (2, 8, 8, 6), False),
        (nn.Linear(6, 8), (2, 8, 8, 6), False),
        (nn.LayerNorm(5), (2, 7, 6, 5), False),
        (nn.Conv2d(6, 5, 1), (2, 6, 7, 4), True),
        (nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)), (2, 6, 7, 4), True),
    ]
    for layer, shape, first in cases:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            maps = act(layer(torch.randn(shape)))
        axis = ChannelAxis(nn.GELU())
        assert axis.is_first(maps) is first
        assert not axis.is_doubtful(maps)
        assert axis.is_first(maps.detach()) is first  # what was told once holds
    for turned in (
        act(nn.Conv2d(6, 5, 1)(torch.randn(2, 6, 7, 4)).permute(0, 2, 3, 1)),
        act(nn.Linear(6, 5)(torch.randn(2, 7, 4, 6)).permute(0, 3, 1, 2)),
    ):
        assert ChannelAxis(nn.GELU()).is_doubtful(turned)
