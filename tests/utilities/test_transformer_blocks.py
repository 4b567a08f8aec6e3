"""Blocks of transformers, and what in them writes to the stream, by the layouts that models have."""

import pytest
from torch import nn

from lightning_collapse.utilities.transformer_blocks import transformer_blocks


def part(**kids):
    module = nn.Module()
    for name, kid in kids.items():
        setattr(module, name.replace("_dot_", "."), kid)
    return module


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs)


class Conv1D(nn.Module):
    """As Hugging Face has it: the weight is ``(inputs, outputs)``."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx, self.weight = nf, nx, nn.Parameter(linear(nf, nx).weight.detach())


class Block(nn.Module):
    def __init__(self, **kids):
        super().__init__()
        for name, kid in kids.items():
            setattr(self, name, kid)


def gpt2():
    mlp = part(c_fc=Conv1D(32, 8), c_proj=Conv1D(8, 32))
    return Block(ln_1=nn.LayerNorm(8), attn=part(c_attn=Conv1D(24, 8), c_proj=Conv1D(8, 8)), mlp=mlp)


def bert():
    own = part(query=linear(8, 8), key=linear(8, 8), value=linear(8, 8))
    attention = nn.Module()
    attention.add_module("self", own)
    attention.output = part(dense=linear(8, 8), LayerNorm=nn.LayerNorm(8))
    return Block(attention=attention, intermediate=part(dense=linear(8, 32)), output=part(dense=linear(32, 8)))


def llama():
    attn = part(q_proj=linear(8, 8), k_proj=linear(8, 4), v_proj=linear(8, 4), o_proj=linear(8, 8))
    mlp = part(gate_proj=linear(8, 24), up_proj=linear(8, 24), down_proj=linear(24, 8))
    return Block(self_attn=attn, mlp=mlp)


class SelfAttentionLayer(Block): ...


class FeedForwardLayer(Block): ...


def t5():
    attention = part(q=linear(8, 6), k=linear(8, 6), v=linear(8, 6), o=linear(6, 8))
    dense = part(wi=linear(8, 32), wo=linear(32, 8))
    layers = [SelfAttentionLayer(SelfAttention=attention), FeedForwardLayer(DenseReluDense=dense)]
    return Block(layer=nn.ModuleList(layers))


def timm():
    attn = part(qkv=linear(8, 24), proj=linear(8, 8))
    return Block(attn=attn, mlp=part(fc1=linear(8, 32), act=nn.GELU(), fc2=linear(32, 8)))


@pytest.mark.parametrize(
    ("make", "writers"),
    [
        (gpt2, ["attn.c_proj", "mlp.c_proj"]),
        (bert, ["attention.output.dense", "output.dense"]),
        (llama, ["self_attn.o_proj", "mlp.down_proj"]),
        (t5, ["layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"]),
        (timm, ["attn.proj", "mlp.fc2"]),
    ],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_and_writers_are_found(make, writers, depth):
    root = part(embed=nn.Embedding(5, 8), layers=nn.ModuleList(make() for _ in range(depth)), head=linear(8, 5))
    found = transformer_blocks(root)
    assert [block.name for block in found] == [f"layers.{i}" for i in range(depth)]
    for block in found:
        assert [writer.name.removeprefix(f"{block.name}.") for writer in block.writers] == writers
        assert not block.length_first


def test_stages_have_their_blocks_and_decoders_their_second_attention():
    stages = nn.ModuleList(part(blocks=nn.Sequential(timm(), timm())) for _ in range(2))
    found = transformer_blocks(part(stages=stages))
    assert [block.name for block in found] == [f"stages.{i}.blocks.{j}" for i in range(2) for j in range(2)]
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)
    [first, _] = transformer_blocks(decoder)
    assert [w.name for w in first.writers] == [f"layers.0.{w}" for w in ("self_attn", "multihead_attn", "linear2")]
    assert first.length_first


def test_an_attention_alone_is_a_block_and_without_any_there_is_none():
    [alone] = transformer_blocks(part(mix=nn.MultiheadAttention(8, 2, batch_first=True), head=linear(8, 2)))
    assert (alone.name, alone.writers) == ("mix", ())
    assert transformer_blocks(nn.Sequential(linear(4, 4), linear(4, 4), linear(4, 4))) == []


def test_what_makes_biases_of_positions_writes_nothing():
    """Registered before the projections, from coordinates to one number for each head, as in Swin v2."""

    def swin():
        biases = nn.Sequential(linear(2, 16), nn.ReLU(), linear(16, 2))
        attn = part(cpb_mlp=biases, qkv=linear(8, 24), proj=linear(8, 8))
        return Block(attn=attn, mlp=part(fc1=linear(8, 32), fc2=linear(32, 8)))

    blocks = nn.ModuleList(swin() for _ in range(2))
    [first, _] = transformer_blocks(part(layers=blocks))
    assert [writer.name for writer in first.writers] == ["layers.0.attn.proj", "layers.0.mlp.fc2"]
