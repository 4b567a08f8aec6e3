"""Series activations begin as the activation itself, and every copy that they add can learn."""

import pytest
import torch
from torch import nn

from lightning_collapse.layers import ConversionError, SeriesActivation


def converted(activation: nn.Module, **arguments: int) -> SeriesActivation:
    assert SeriesActivation.convert_(activation, **arguments) == [""]
    return activation


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("make", [nn.GELU, nn.SiLU, nn.Tanh])
def test_begins_as_the_activation_exactly(make: type[nn.Module], channels: int | None) -> None:
    of, x = converted(make(), terms=3, channels=channels), torch.randn(50, 6)
    assert torch.equal(of(x), make()(x))
    assert of.slope.shape == of.shift.shape == (3, channels or 1)
    of(x).sum().backward()
    assert (of.slope.grad != 0).all()
    assert (of.shift.grad != 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_begins_as_itself_with_a_second_copy_that_is_alive(inplace: bool) -> None:
    of, x = converted(nn.ReLU(inplace=inplace)), torch.randn(50, 6)
    out = of(x)
    torch.testing.assert_close(out, x.relu(), rtol=1e-6, atol=0)
    torch.testing.assert_close(of.slope.detach().flatten(), torch.tensor([0.999, 0.001]))
    out.sum().backward()
    assert (of.slope.grad != 0).all()
    of.slope.data = torch.tensor([[1.0], [0.0]])
    of.slope.grad = None
    of(x).sum().backward()
    assert of.slope.grad[1] == 0


def test_value_is_the_sum() -> None:
    of, x = converted(nn.GELU(), channels=4).double(), torch.randn(3, 4, dtype=torch.float64)
    for p in of.parameters():
        nn.init.normal_(p)
    expected = sum(nn.functional.gelu(a * x + b) for a, b in zip(of.slope, of.shift, strict=True))
    torch.testing.assert_close(of(x), expected)


def test_what_could_not_begin_as_itself_or_not_learn_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.ReLU6(), nn.GELU(), nn.Softmax(dim=-1)).bfloat16()
    with pytest.raises(ConversionError) as error:
        SeriesActivation.convert_(net)
    assert "- `1`: it is not 0 at 0" in str(error.value)
    assert "- `2`: it is flat at 0 and not homogeneous" in str(error.value)
    assert SeriesActivation.convert_(net, exclude=["1", "2"]) == ["3"]
    assert {p.dtype for p in SeriesActivation.added_parameters(net).values()} == {torch.bfloat16}
    with pytest.raises(ConversionError, match="a sum of activations is none of its terms"):
        SeriesActivation.revert_(net)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU())
    with pytest.raises(ConversionError, match="torch's transformer layer leaves it out in evaluation"):
        SeriesActivation.convert_(layer)
    with pytest.raises(ValueError, match="`terms` must be an integer of at least 2, got 1"):
        SeriesActivation.convert_(net, terms=1)
