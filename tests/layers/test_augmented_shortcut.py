"""Augmented shortcuts: the circulant product against its matrix, the released form, and the form that begins as none."""

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.layers import AugmentedShortcut, BlockCirculant


def matrix(of: BlockCirculant) -> Tensor:
    """Entry by entry."""
    blocks, _, width = of.weight.shape
    rows = range(blocks * width)
    return torch.stack(
        [
            torch.stack([of.weight[r // width, c // width, (r % width - c % width) % width] for c in rows])
            for r in rows
        ]
    )


@pytest.mark.parametrize(("dim", "blocks"), [(12, 4), (12, 1), (20, 4), (6, 6)])
def test_product_and_gradient_are_those_of_the_matrix(dim: int, blocks: int) -> None:
    of = BlockCirculant(dim, blocks).double()
    assert of.weight.numel() == blocks * dim
    x = torch.randn(2, 3, dim, dtype=torch.float64, requires_grad=True)
    out, expected = of(x), x @ matrix(of).T + of.bias
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    leaves = [x, of.weight, of.bias]
    for found, exact in zip(*(torch.autograd.grad(o.sin().sum(), leaves) for o in (out, expected)), strict=True):
        torch.testing.assert_close(found, exact)
    assert {name for name, _ in of.named_buffers()} == set()
    assert max(p.numel() for p in of.parameters()) == max(blocks * dim, dim)


def test_start_is_the_published_range() -> None:
    of = BlockCirculant(64)
    for parameter in (of.weight, of.bias):
        assert 0.9 / 8 < parameter.abs().max() <= 1 / 8


def test_released_form() -> None:
    of = AugmentedShortcut(8).double()
    x, f, h = torch.randn(3, 2, 5, 8, dtype=torch.float64).unbind()
    first, second = (nn.functional.gelu(h @ matrix(path).T + path.bias) for path in of.paths)
    torch.testing.assert_close(of(x, f, h), (x + f + first + second) * 3 / 4)


def test_a_path_from_zero_is_the_plain_sum_and_learns() -> None:
    of = AugmentedShortcut(8, paths=1, scale=1.0, zero=True)
    x, f, h = torch.randn(3, 2, 5, 8).unbind()
    out = of(x, f, h)
    assert torch.equal(out, x + f)
    out.square().sum().backward()
    assert all((p.grad != 0).all() for p in of.parameters())
    with pytest.raises(ValueError, match="`paths` must be 1 with `zero=True`, got 2"):
        AugmentedShortcut(8, zero=True)


def test_precisions_compilation_and_the_meta_device() -> None:
    of, (x, f, h) = AugmentedShortcut(8), torch.randn(3, 2, 5, 8).unbind()
    exact = of(x, f, h)
    torch.testing.assert_close(torch.compile(of, backend="aot_eager")(x, f, h), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert of.paths[0](h.bfloat16()).dtype == torch.bfloat16
    half = of.bfloat16()
    out = half(x.bfloat16(), f.bfloat16(), h.bfloat16())
    out.sum().backward()
    assert out.dtype == half.paths[0].weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)
    with torch.device("meta"):
        empty = AugmentedShortcut(8, paths=1, zero=True)
    empty.to_empty(device="cpu")
    for module in empty.paths:
        module.weight.data.fill_(7)
        module.reset_parameters()
    assert not empty.paths[0].weight.any()


def test_bound_on_what_attention_leaves_of_diversity() -> None:
    """``d(A Z W) <= ||(I - J) A||_2 ||W||_2 d(Z)``, and a path beside attention keeps more than attention does."""
    generator = torch.Generator().manual_seed(0)
    n, d = 16, 12
    z, logits = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (d, n))
    attention, center = logits.softmax(dim=-1), torch.eye(n, dtype=torch.float64) - 1 / n
    w = matrix(BlockCirculant(d).double()).detach()
    left = (center @ attention @ z @ w).norm()
    assert left <= torch.linalg.matrix_norm(center @ attention, 2) * torch.linalg.matrix_norm(w, 2) * (center @ z).norm()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`dim` must be a multiple of `blocks`, got 10 and 4"):
        BlockCirculant(10)
    with pytest.raises(ValueError, match="`paths` must be an integer of at least 1, got 0"):
        AugmentedShortcut(8, paths=0)
    assert "BlockCirculant(dim=8, blocks=4)" in repr(AugmentedShortcut(8))
