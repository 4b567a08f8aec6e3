"""Augmented shortcuts: the circulant product against its matrix, the released form, and branches that begin plain."""

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.layers import AugmentedBranch, AugmentedShortcut, ConversionError


def matrix(blocks: Tensor) -> Tensor:
    """Entry by entry, of the first columns of all blocks."""
    width = blocks.shape[-1]
    rows = range(len(blocks) * width)
    return torch.stack(
        [torch.stack([blocks[r // width, c // width, (r - c) % width] for c in rows]) for r in rows],
    )


@pytest.mark.parametrize(("dim", "blocks"), [(8, 4), (5, 1), (12, 4), (6, 6)])
def test_value_and_gradient_are_those_of_the_matrices(dim: int, blocks: int) -> None:
    of = AugmentedShortcut(dim, blocks=blocks).double()
    assert of.weight[0].numel() == blocks * dim
    assert not list(of.buffers())
    leaves = [*torch.randn(3, 2, 3, dim, dtype=torch.float64).requires_grad_().unbind(), of.weight, of.bias]
    x, f, h = leaves[:3]
    first, second = (nn.functional.gelu(h @ matrix(w).T + b) for w, b in zip(of.weight, of.bias, strict=True))
    out, expected = of(x, f, h), (x + f + first + second) * 3 / 4
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    for found, exact in zip(*(torch.autograd.grad(o.sin().sum(), leaves) for o in (out, expected)), strict=True):
        torch.testing.assert_close(found, exact)


def test_start_is_the_published_range() -> None:
    of = AugmentedShortcut(64)
    for parameter in of.parameters():
        assert 0.9 / 8 < parameter.abs().max() <= 1 / 8


def test_precisions_and_the_meta_device() -> None:
    of, (x, f, h) = AugmentedShortcut(8), torch.randn(3, 2, 5, 8).unbind()
    exact = of(x, f, h)
    half = of.bfloat16()
    out = half(x.bfloat16(), f.bfloat16(), h.bfloat16())
    out.sum().backward()
    assert out.dtype == half.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)
    with torch.device("meta"):
        empty = AugmentedShortcut(8)
    empty.to_empty(device="cpu").reset_parameters()
    assert empty.weight.abs().max() <= 8**-0.5


def test_bound_on_what_attention_leaves_of_diversity() -> None:
    """``d(A Z W) <= ||(I - J) A||_2 ||W||_2 d(Z)``."""
    generator = torch.Generator().manual_seed(0)
    n, d = 16, 12
    z, logits = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (d, n))
    attention, center = logits.softmax(dim=-1), torch.eye(n, dtype=torch.float64) - 1 / n
    w = matrix(AugmentedShortcut(d).double().weight[0]).detach()
    norms = torch.linalg.matrix_norm(center @ attention, 2) * torch.linalg.matrix_norm(w, 2)
    assert (center @ attention @ z @ w).norm() <= norms * (center @ z).norm()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(query=h, key=h, value=h)[0]
        return x + self.mlp(self.norm2(x))


def test_branches_begin_plain_and_their_paths_learn() -> None:
    net, x = nn.Sequential(Block(), Block()), torch.randn(2, 5, 8)
    before = {mode: net.train(mode)(x) for mode in (True, False)}
    assert AugmentedBranch.convert_(net, ["*.attn", "*.mlp"], dim=8) == ["0.attn", "0.mlp", "1.attn", "1.mlp"]
    for mode, expected in before.items():
        assert torch.equal(net.train(mode)(x), expected)
    net(x).square().sum().backward()
    assert all((p.grad != 0).all() for p in AugmentedBranch.added_parameters(net).values())
    path = net[0].mlp
    path.circulant.data.normal_()
    h = torch.randn(2, 5, 8)
    plain = nn.Sequential(*path)(h)
    torch.testing.assert_close(path(h), plain + nn.functional.gelu(h @ matrix(path.circulant[0]).T))
    with pytest.raises(ConversionError, match=r"no weights of its own do what the path does. Keep it."):
        AugmentedBranch.revert_(net)


def test_parts_of_a_fused_layer_are_refused() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), 1, enable_nested_tensor=False)
    with pytest.raises(ConversionError, match=r"`layers.0.self_attn`: torch's transformer layer leaves it out in eval"):
        AugmentedBranch.convert_(net, ["layers.*.self_attn"], dim=8)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`dim` must be a multiple of `blocks`, got 10 and 4"):
        AugmentedShortcut(10)
    with pytest.raises(ValueError, match="`paths` must be an integer of at least 1, got 0"):
        AugmentedShortcut(8, paths=0)
    with pytest.raises(ValueError, match="`dim` is 8, and what the branch received has 4 features"):
        AugmentedShortcut(8)(*torch.zeros(3, 1, 4).unbind())
    assert repr(AugmentedShortcut(8)) == "AugmentedShortcut(dim=8, paths=2, blocks=4, scale=0.75)"
