"""Consistency under interpolation and flips: the floor of affine maps, and that constant outputs minimize both."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.losses import TooFewRowsError, flip_consistency, interpolation_consistency


@pytest.fixture(autouse=True)
def same_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def constant(x: Tensor) -> Tensor:
    return x.new_ones(len(x), 2)


@pytest.mark.parametrize("network", [nn.Linear(5, 16).requires_grad_(False), constant])
def test_floor_of_affine_networks(network: nn.Module) -> None:
    x, y = torch.randn(2, 4000, 5)
    assert interpolation_consistency(network, x, y).item() == pytest.approx(0.0025, rel=0.05)
    assert interpolation_consistency(network, x, y, noise=0.0).item() == pytest.approx(0, abs=1e-10)


def test_interpolation_of_a_square() -> None:
    """f(x) = x^2 is off by a (1 - a) (x - y)^2, and E[a^2 (1 - a)^2] = E[a^2] - 2 E[a^3] + E[a^4] = 4 for normal a."""
    x, y = torch.zeros(200_000, 1), torch.ones(200_000, 1)
    assert interpolation_consistency(torch.square, x, y, noise=0.0).item() == pytest.approx(4, rel=0.1)


def test_inputs_of_any_rank_and_targets_without_gradient() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Tanh())
    x, y = torch.randn(2, 6, 3, 2, 2)
    calls: list[bool] = []
    network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    interpolation_consistency(network, x, y).backward()
    flip_consistency(network, x).backward()
    assert calls == [False, False, True, False, True]
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_flips() -> None:
    images = torch.arange(8.0).view(1, 1, 2, 4).expand(3, 1, 2, 4)
    found = {round(flip_consistency(nn.Flatten(), images, noise=0.0).item(), 4) for _ in range(20)}
    assert found == {5.0, 16.0}  # left to right 3, 1, 1, 3; upside down 4
    assert flip_consistency(constant, images).item() == 0
    noise = flip_consistency(nn.Flatten(), torch.zeros(4000, 1, 2, 4)).item()
    assert noise == pytest.approx(1e-6, rel=0.05)


def test_half_in_float_out() -> None:
    network = nn.Linear(5, 4).bfloat16()
    x, y = torch.randn(2, 8, 5).bfloat16()
    assert interpolation_consistency(network, x, y).dtype == torch.float32


def test_misuse_is_refused() -> None:
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match="must be floating point of one shape, got"):
        interpolation_consistency(constant, x, x[:2])
    with pytest.raises(
        ValueError, match=r"`images` of `flip_consistency` must be floating point of shape \(N, C, H, W\)"
    ):
        flip_consistency(constant, x)
    with pytest.raises(ValueError, match=r"`output` of `interpolation_consistency` must be floating point of shape"):
        interpolation_consistency(lambda z: z[:, 0], x, x)
    with pytest.raises(ValueError, match="`noise` must not be negative"):
        interpolation_consistency(constant, x, x, noise=-1.0)
    with pytest.raises(TooFewRowsError):
        flip_consistency(constant, torch.zeros(0, 1, 2, 2))
