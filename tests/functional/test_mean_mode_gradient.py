"""The gradient of a writer is the sum of its parts, and the parts are those of plain float64 sums."""

import math

import pytest
import torch

from lightning_collapse.functional import mean_mode_gradient


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_parts_are_those_of_plain_sums_with_padding():
    y, delta = drawn(3, 6, 5) + 1, drawn(3, 6, 4, seed=1) + 0.5
    mask = torch.arange(6).expand(3, 6) < torch.tensor([[6], [4], [3]])
    mean, centered, energy = torch.zeros(4, 5).double(), torch.zeros(4, 5).double(), 0.0
    for one, other, n in zip(y, delta, (6, 4, 3), strict=True):
        a, b = one[:n].mean(dim=0), other[:n].mean(dim=0)
        mean += n * b.outer(a)
        centered += sum((other[t] - b).outer(one[t] - a) for t in range(n))
        energy += sum(float(other[t].norm() ** 2 * one[t].norm() ** 2) for t in range(n))
    weight = drawn(4, 5, seed=2).requires_grad_()
    ((y @ weight.T) * delta * mask.unsqueeze(-1)).sum().backward()
    torch.testing.assert_close(mean + centered, weight.grad)  # the identity that the split rests on
    y[~mask] = math.nan
    found = mean_mode_gradient(y, delta, mask)
    total = weight.grad.norm()
    assert float(found.mean) == pytest.approx(float(mean.norm() / total))
    assert float(found.centered) == pytest.approx(float(centered.norm() / total))
    assert float(found.amplification) == pytest.approx(float(total**2) / energy)
    torch.testing.assert_close(torch.stack(mean_mode_gradient(y, 1024 * delta, mask)), torch.stack(found))


def test_coherent_tokens_amplify_by_their_number_and_have_no_centered_part():
    found = mean_mode_gradient(torch.ones(2, 8, 3), torch.ones(2, 8, 2))
    assert [float(x) for x in found] == pytest.approx([1.0, 0.0, 16.0], abs=1e-6)
    found = mean_mode_gradient(drawn(200, 9, 32), drawn(200, 9, 32, seed=1))
    assert float(found.mean) == pytest.approx(1 / 3, rel=0.05)
    assert float(found.amplification) == pytest.approx(1.0, rel=0.1)


def test_no_gradient_has_no_parts_and_other_tokens_are_refused():
    assert torch.stack(mean_mode_gradient(torch.ones(1, 2, 3), torch.zeros(1, 2, 3))).isnan().all()
    with pytest.raises(ValueError, match=r"same tokens, got \(\(1, 2, 3\), \(1, 3, 3\)\)"):
        mean_mode_gradient(torch.ones(1, 2, 3), torch.ones(1, 3, 3))
