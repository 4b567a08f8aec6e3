"""Series activations begin as the activation itself, and every copy that they add can learn."""

import pytest
import torch
from torch import nn

from lightning_collapse.layers import SeriesActivation


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("make", [nn.GELU, nn.SiLU, nn.Tanh, nn.Mish])
def test_begins_as_the_activation_exactly(make: type[nn.Module], channels: int | None) -> None:
    of, x = SeriesActivation(make(), terms=3, channels=channels), torch.randn(50, 6)
    assert torch.equal(of(x), make()(x))
    assert of.slope.shape == of.shift.shape == (3, channels or 1)
    of(x).sum().backward()
    assert (of.slope.grad != 0).all()
    assert (of.shift.grad[1] != 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_begins_as_itself_with_a_second_copy_that_is_alive(inplace: bool) -> None:
    of, x = SeriesActivation(nn.ReLU(inplace=inplace)), torch.randn(50, 6)
    out = of(x)
    torch.testing.assert_close(out, x.relu(), rtol=1e-6, atol=0)
    torch.testing.assert_close(of.slope.detach().flatten(), torch.tensor([0.999, 0.001]))
    out.sum().backward()
    assert (of.slope.grad != 0).all()
    dead = SeriesActivation(nn.ReLU())
    dead.slope.data = torch.tensor([[1.0], [0.0]])
    dead(x).sum().backward()
    assert dead.slope.grad[1] == 0


def test_value_is_the_sum() -> None:
    of, x = SeriesActivation(nn.GELU(), channels=4).double(), torch.randn(3, 4, dtype=torch.float64)
    for p in of.parameters():
        nn.init.normal_(p)
    expected = sum(nn.functional.gelu(a * x + b) for a, b in zip(of.slope, of.shift, strict=True))
    torch.testing.assert_close(of(x), expected)
    torch.testing.assert_close(torch.compile(of, backend="aot_eager", fullgraph=True)(x), expected)


def test_what_could_not_begin_as_itself_or_not_learn_is_refused() -> None:
    for make in (nn.Sigmoid, nn.Softplus):
        with pytest.raises(ValueError, match=f"`activation` must map 0 to 0, got {make.__name__}"):
            SeriesActivation(make())
    for make in (nn.ReLU6, nn.Hardshrink):
        with pytest.raises(ValueError, match=f"`activation` {make.__name__} is flat at 0 and not homogeneous"):
            SeriesActivation(make())
    assert torch.equal(SeriesActivation(nn.ReLU6(), terms=1)(torch.tensor([7.0])), torch.tensor([6.0]))


def test_meta_device_and_precision() -> None:
    with torch.device("meta"):
        of = SeriesActivation(nn.ReLU(), channels=3)
    of.to_empty(device="cpu").reset_parameters()
    x = torch.randn(4, 3)
    torch.testing.assert_close(of(x), x.relu())
    assert of.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert "terms=2, channels=3" in repr(of)
