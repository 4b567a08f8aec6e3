"""Attention temperature: logits over τ, wherever queries are made; decoders and what does not scale are refused."""

import pytest
import torch
from torch import nn

from lightning_collapse.layers import AttentionTemperature, ConversionError

HEADS, WIDTH = 2, 8
TAU = 0.5


class Attention(nn.Module):
    """Self-attention with what makes queries in the ways that models have."""

    def __init__(self, how="qkv", **flags):
        super().__init__()
        self.num_heads = HEADS
        if how == "qkv":
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        elif how == "grouped":
            self.head_dim, self.qkv = WIDTH // HEADS, nn.Linear(WIDTH, 2 * WIDTH)
        else:
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        if how in NORMS:
            self.q_norm, self.k_norm = NORMS[how](), NORMS[how]()
        if how == "bias":
            self.relative_attention_bias = nn.Embedding(7, HEADS)
        self.has_relative_attention_bias = how == "bias"
        for name, value in flags.items():
            setattr(self, name, value)

    def logits(self, x, bias=0.0):
        if hasattr(self, "qkv"):
            q, k = self.qkv(x)[..., :WIDTH], self.qkv(x)[..., WIDTH : (self.qkv.out_features + WIDTH) // 2]
        else:
            q, k = self.query(x), self.key(x)
        q, k = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (q, k))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.has_relative_attention_bias:
            places = torch.arange(x.shape[1])
            bias = self.relative_attention_bias(places[:, None] - places + 3).permute(2, 0, 1)
        return q @ k.expand_as(q).transpose(-2, -1) + bias


class NormWithGainOfOne(nn.Module):
    """A norm whose gain is added to 1, as Gemma has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH // HEADS))

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) * (1 + self.weight)


def layer_norm():
    norm = nn.LayerNorm(WIDTH // HEADS)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


NORMS = {
    "norm": layer_norm,
    "gain of one": NormWithGainOfOne,
    "no gain": lambda: nn.LayerNorm(4, elementwise_affine=False),
}


@pytest.mark.parametrize(
    ("how", "learn"),
    [("bias", False), *((how, learn) for how in ("qkv", "grouped", "separate", "norm") for learn in (False, True))],
)
def test_logits_are_over_tau(how, learn):
    attention, x = nn.ModuleList([Attention(how)]).double(), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    before = attention[0].logits(x).detach()
    AttentionTemperature.convert_(attention, tau=TAU, learn=learn)
    torch.testing.assert_close(attention[0].logits(x).detach(), before / TAU, rtol=1e-12, atol=1e-12)
    taus = list(AttentionTemperature.added_parameters(attention).values())
    assert len(taus) == learn
    if learn:  # d(z / τ) / dτ = -z / τ²
        (gradient,) = torch.autograd.grad(attention[0].logits(x).sum(), taus)
        torch.testing.assert_close(gradient, -before.sum()[None] / TAU**2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dims", [{}, {"kdim": WIDTH + 1, "vdim": WIDTH + 1}])
def test_multi_head_attention_becomes_sharper(dims):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **dims).double()
    nn.init.normal_(attention.in_proj_bias)
    x, keys = torch.randn(2, 3, WIDTH), torch.randn(2, 5, dims.get("kdim", WIDTH))
    x, keys = x.double(), keys.double()
    before = attention(x, keys, keys, average_attn_weights=False)[1]
    AttentionTemperature.convert_(attention, tau=TAU, decoders=bool(dims))
    after = attention(x, keys, keys, average_attn_weights=False)[1]
    torch.testing.assert_close(after, (before.log() / TAU).softmax(dim=-1), rtol=1e-10, atol=0)
    entropy = [-(rows * rows.log()).sum(dim=-1) for rows in (before, after)]
    assert (entropy[1] < entropy[0]).all()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            nn.TransformerDecoderLayer(WIDTH, HEADS),
            r"`self_attn`: it is part of a decoder(?s:.*)`multihead_attn`: it is",
        ),
        (nn.ModuleList([Attention(is_causal=True)]), "`0.qkv`: it is part of a decoder"),
        (nn.ModuleList([Attention(is_cross_attention=True)]), "`0.qkv`: it is cross-attention. `decoders=True`"),
        (nn.ModuleDict({"cross_attn": Attention()}), "`cross_attn.qkv`: it is cross-attention"),
        (nn.MultiheadAttention(WIDTH, HEADS, kdim=4), "it is cross-attention"),
        (nn.ModuleList([Attention("gain of one")]), "its `q_norm` is not proportional to a gain"),
        (nn.ModuleList([Attention("no gain")]), "its `q_norm` is not proportional to a gain"),
        (nn.ModuleList([Attention(q_bias=nn.Parameter(torch.ones(2)))]), "its `q_bias` is added"),
        (nn.ModuleList([Attention(relative_position_bias_table=nn.Parameter(torch.ones(2)))]), "bias_table` is added"),
        (
            nn.ModuleList([Attention(qkv=nn.Linear(WIDTH, WIDTH + 4))]),
            "how many of the 12 outputs of `qkv` are queries",
        ),
    ],
)
def test_refusals(model, match):
    with pytest.raises(ConversionError, match=match):
        AttentionTemperature.convert_(model, tau=TAU)
    assert not any(isinstance(module, AttentionTemperature) for module in model.modules())


def test_decoders_when_asked():
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS)
    assert AttentionTemperature.convert_(layer, decoders=True) == ["self_attn", "multihead_attn"]


def test_a_position_bias_of_all_layers():
    def stack():
        return nn.ModuleDict({"block": nn.ModuleList([Attention("bias"), Attention("separate")])})

    names = AttentionTemperature.convert_(stack(), tau=TAU)
    assert names == ["block.0.query", "block.0.relative_attention_bias", "block.1.query"]
    with pytest.raises(ConversionError, match="Leave `learn` out"):
        AttentionTemperature.convert_(stack(), learn=True)
    with pytest.raises(ConversionError, match=r"added to the logits of `block.1` too. Convert all layers or none"):
        AttentionTemperature.convert_(stack(), tau=TAU, exclude=["block.1"])


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_tau_is_checked(tau):
    with pytest.raises(ValueError, match="`tau` must be"):
        AttentionTemperature.convert_(nn.MultiheadAttention(WIDTH, HEADS), tau=tau)
