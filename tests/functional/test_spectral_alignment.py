"""Closed forms of spectral alignment, and its signs against a singular value decomposition."""

from math import comb, nan

import pytest
import torch

from lightning_collapse.functional import (
    expected_majority_fraction,
    majority_fraction,
    mean_energy_share,
    sign_diversity,
    spectral_alignment,
)

A, B = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, -1.2, 0.4, 2.0])
RANK_ONE = torch.outer(A, B)


def by_svd(inputs, weight):
    v = torch.linalg.svd(weight.double())[2][0]
    return inputs.double() @ v / inputs.double().norm(dim=1)


def trained():
    """The weight of a layer after some training, and what it receives."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 24), torch.nn.Linear(24, 1))
    x = torch.randn(256, 20)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        (net(x) - x[:, :1] * x[:, 1:2]).pow(2).mean().backward()
        optimizer.step()
    return net[1](net[0](x)).detach(), net[2].weight.detach()


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_all_inputs_along_the_singular_vector(scale):
    rows = scale * torch.linspace(0.1, 5, 9).unsqueeze(1) * B
    alignment = spectral_alignment(rows, RANK_ONE)
    torch.testing.assert_close(alignment, scale * torch.ones(9))  # the largest component of B is positive
    assert sign_diversity(alignment) == 0
    assert majority_fraction(alignment) == 1


def test_half_on_either_side():
    alignment = spectral_alignment(torch.cat([B.expand(6, 4), -B.expand(6, 4)]), RANK_ONE)
    torch.testing.assert_close(alignment.abs(), torch.ones(12))
    assert sign_diversity(alignment) == 1
    assert majority_fraction(alignment) == 0.5


def test_perpendicular_inputs_and_zeros_are_on_neither_side():
    basis = torch.linalg.qr(torch.cat([B.unsqueeze(1), torch.randn(4, 3)], dim=1))[0].T
    rows = torch.cat([basis[1:], torch.zeros(1, 4), -3 * B.unsqueeze(0)])
    alignment = spectral_alignment(rows, RANK_ONE)
    assert alignment[:4].tolist() == [0, 0, 0, 0]
    assert sign_diversity(alignment) == 0
    assert sign_diversity(alignment[:4]).isnan()


@pytest.mark.parametrize("make", [trained, lambda: (torch.randn(300, 40), torch.randn(40, 40))])
def test_signs_are_those_of_the_decomposition_and_of_the_output_side(make):
    inputs, weight = make()
    alignment, exact = spectral_alignment(inputs, weight), by_svd(inputs, weight)
    exact = exact * torch.sign(exact[0] * alignment[0])
    torch.testing.assert_close(alignment.double(), exact, rtol=0, atol=1e-5)
    u = torch.linalg.svd(weight.double())[0][:, 0]
    outputs = inputs.double() @ weight.double().T @ u
    diversity = sign_diversity(alignment)
    assert diversity == pytest.approx(sign_diversity(exact).item(), abs=1e-7)
    assert diversity == pytest.approx(sign_diversity(outputs).item(), abs=1e-7)
    share = (exact > 0).double().mean()
    assert diversity == pytest.approx(1 - abs(2 * share.item() - 1), abs=1e-6)


def test_centered_is_that_of_the_rows_less_their_mean():
    inputs, weight = torch.randn(200, 10) + 5, torch.randn(8, 10)
    torch.testing.assert_close(
        spectral_alignment(inputs, weight, center=True),
        spectral_alignment(inputs - inputs.mean(dim=0), weight),
        rtol=0,
        atol=1e-5,
    )
    line = 10 * torch.linalg.svd(weight)[2][0]
    assert sign_diversity(spectral_alignment(inputs + line, weight)) == 0
    assert sign_diversity(spectral_alignment(inputs + line, weight, center=True)) > 0.8


def test_bad_rows_do_not_count():
    inputs, weight = torch.randn(50, 6), torch.randn(5, 6)
    spoiled = torch.cat([inputs, torch.full((1, 6), nan), torch.tensor([[float("inf"), 0, 0, 0, 0, 0]])])
    for center in (False, True):
        clean, found = spectral_alignment(inputs, weight, center), spectral_alignment(spoiled, weight, center)
        assert found[50:].isnan().all()
        torch.testing.assert_close(found[:50], clean)
        assert sign_diversity(found) == sign_diversity(clean)
    torch.testing.assert_close(mean_energy_share(spoiled), mean_energy_share(inputs))
    assert spectral_alignment(inputs, weight * nan).isnan().all()
    assert spectral_alignment(inputs, weight * 0).isnan().all()


def test_half_inputs():
    inputs, weight = torch.randn(100, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        alignment = spectral_alignment(inputs, weight)
        share = mean_energy_share(inputs)
    assert alignment.dtype == share.dtype == torch.float32
    torch.testing.assert_close(alignment.abs().double(), by_svd(inputs, weight).abs(), rtol=0, atol=1e-6)
    assert share == pytest.approx(mean_energy_share(inputs.double()).item(), rel=1e-6)


def test_diversity_over_leading_dimensions():
    alignment = torch.randn(3, 4, 50)
    expected = torch.stack([torch.stack([sign_diversity(row) for row in rows]) for rows in alignment])
    assert torch.equal(sign_diversity(alignment), expected)
    assert torch.equal(majority_fraction(alignment), 1 - expected / 2)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 257])
def test_expected_majority_is_that_of_the_binomial(n):
    exact = sum(comb(n, k) * max(k, n - k) for k in range(n + 1)) / 2**n / n
    assert expected_majority_fraction(n) == pytest.approx(exact, rel=1e-12)


def test_expected_majority_of_many():
    assert expected_majority_fraction(8192) == pytest.approx(0.5 + (2 * torch.pi * 8192) ** -0.5, rel=1e-6)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        expected_majority_fraction(0)


def test_mean_energy_share():
    assert mean_energy_share(torch.ones(7, 3) * 4) == pytest.approx(1)
    assert mean_energy_share(torch.cat([B.expand(5, 4), -B.expand(5, 4)])) == pytest.approx(0, abs=1e-7)
    assert mean_energy_share(torch.zeros(4, 3)).isnan()
    # independent rows without a mean: 1 / N
    assert mean_energy_share(torch.randn(50, 4000)) == pytest.approx(1 / 50, rel=0.1)


@pytest.mark.parametrize("shapes", [((3, 4, 5), (2, 5)), ((3, 4), (2, 5)), ((3, 4), (4,))])
def test_shapes_must_fit(shapes):
    with pytest.raises(ValueError, match="`inputs` must have shape"):
        spectral_alignment(torch.ones(shapes[0]), torch.ones(shapes[1]))
