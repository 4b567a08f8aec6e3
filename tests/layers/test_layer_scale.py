"""LayerScale and ReZero: gains of residual branches, what they start from, and what learns first."""

import pytest
import torch
from torch import nn

from lightning_collapse.layers import LayerScale, ReZero, layer_scale_init
from tests.layers.cases import Tokens

BRANCHES = [f"encoder.layers.{i}.{end}" for i in range(2) for end in ("self_attn.out_proj", "linear2")]


def rows(module, x):
    return torch.cat([module(x).flatten(1), module.eval()(x).flatten(1)])


@pytest.mark.parametrize("layer", [LayerScale, ReZero])
@pytest.mark.parametrize("gain", [0.0, 0.3])
def test_branches_are_multiplied_by_the_gain(layer, gain):
    """A block of which both branches are scaled is x + g a(x), then + g f(.)."""
    torch.manual_seed(0)
    block = Tokens().encoder.layers[0].double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    middle = x + gain * block._sa_block(block.norm1(x), None, None)
    expected = middle + gain * block._ff_block(block.norm2(middle))
    layer.convert_(block, init=gain, branches=["self_attn.out_proj", "linear2"])
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), expected, rtol=0, atol=1e-12)


def test_names_shapes_and_what_is_shared():
    model = Tokens()
    assert LayerScale.convert_(model) == BRANCHES
    assert {p.shape for p in LayerScale.added_parameters(model).values()} == {(8,)}
    model = Tokens()
    assert ReZero.convert_(model, blocks=["encoder.layers.*"]) == BRANCHES
    first, second, third, _ = (model.get_submodule(name).gain for name in BRANCHES)
    assert first is second
    assert first is not third
    assert list(ReZero.added_parameters(model)) == [f"{BRANCHES[0]}.gain", f"{BRANCHES[2]}.gain"]
    with pytest.raises(ValueError, match="finds nothing to convert"):
        LayerScale.convert_(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="`init` must be finite"):
        ReZero.convert_(Tokens(), init=float("nan"))


def test_at_zero_gains_alone_learn():
    torch.manual_seed(0)
    model = Tokens()
    ReZero.convert_(model, init=0.0)
    model(torch.arange(6).view(2, 3)).square().sum().backward()
    gains = ReZero.added_parameters(model)
    assert all(gain.grad.abs() > 1e-3 for gain in gains.values())
    inside = {key: p for key, p in model.encoder.layers.named_parameters() if not key.endswith("gain")}
    assert all(p.grad.abs().max() == 0 for p in inside.values())


def test_published_starts():
    assert [layer_scale_init(depth) for depth in (1, 18, 19, 24, 25, 48)] == [0.1, 0.1, 1e-5, 1e-5, 1e-6, 1e-6]
    with pytest.raises(ValueError, match="`depth` must be an integer"):
        layer_scale_init(0)
