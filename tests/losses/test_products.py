"""Products that autocast does not touch."""

import pytest
import torch

from lightning_collapse.losses.support.products import product


def test_it_is_the_product_twice_differentiable() -> None:
    left = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    right = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(product(left, right), left @ right)
    assert torch.autograd.gradcheck(product, (left, right))
    assert torch.autograd.gradgradcheck(product, (left, right))


@pytest.mark.parametrize("exact", [True, False])
def test_autocast_in_the_backward_pass(exact: bool) -> None:
    left, right = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (product if exact else torch.matmul)(left, right).float().square().sum().backward()
    reference = 2 * (left.detach() @ right) @ right.mT
    assert torch.allclose(left.grad, reference, rtol=1e-5, atol=1e-5) is exact
