"""The gain of a map is a spectral norm, has its null, and counts valid tokens only."""

from math import expm1, sqrt

import numpy as np
import pytest
import torch

from lightning_collapse.functional import low_pass_gain, low_pass_gain_null


def logits(*shape, spread=1.0, seed=0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(weights):
    weights = weights.double().numpy()
    return np.linalg.norm(weights - weights.mean(axis=0), 2)


def test_it_is_the_norm_of_the_centered_map_on_either_side():
    weights = logits(3, 2, 24, 24, spread=1.5).softmax(-1)
    found = low_pass_gain(weights, steps=400)
    for gain, one in zip(found.flatten(), weights.flatten(0, 1), strict=True):
        assert gain.item() == pytest.approx(reference(one), rel=1e-9)
        both = one - one.mean(dim=0)
        both = both - both.mean(dim=1, keepdim=True)  # rows sum to one: nothing is left to center
        assert torch.linalg.matrix_norm(both, 2).item() == pytest.approx(gain.item(), rel=1e-9)


@pytest.mark.parametrize("spread", [0.3, 0.5])
def test_the_null_of_independent_logits(spread):
    weights = logits(5, 512, 512, spread=spread).softmax(-1)
    null = 2 * sqrt(expm1(spread**2)) / sqrt(512)
    assert low_pass_gain_null(torch.tensor(spread), torch.tensor(512)).item() == pytest.approx(null, rel=1e-6)
    assert low_pass_gain(weights).mean().item() == pytest.approx(null, rel=0.03)  # twenty steps read 1 % low


def test_uniform_causal_maps_exceed_one():
    for length, expected in ((32, 1.12), (1024, 1.55)):
        causal = torch.ones(length, length, dtype=torch.float64).tril()
        assert low_pass_gain(causal / causal.sum(1, keepdim=True)).item() == pytest.approx(expected, abs=0.005)


def test_padding_and_other_numbers_do_not_count():
    weights = logits(1, 10, 10).softmax(-1)
    padded = torch.full((1, 16, 16), torch.nan, dtype=torch.float64)
    padded[:, 3:13, 3:13] = weights
    counts = (torch.arange(16) >= 3) & (torch.arange(16) < 13)
    found = low_pass_gain(padded, counts, steps=200)
    torch.testing.assert_close(found, low_pass_gain(weights, steps=200), rtol=1e-9, atol=0)
    assert low_pass_gain(torch.full((4, 4), torch.nan)).isnan()
    with pytest.raises(ValueError, match=r"square maps .*\(3, 4\)"):
        low_pass_gain(torch.ones(3, 4))


def test_half_precision_is_read_in_single_and_nothing_is_drawn_from_the_random_state():
    state = torch.random.get_rng_state()
    weights = logits(2, 20, 20).softmax(-1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = low_pass_gain(weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, low_pass_gain(weights.float()), rtol=1e-6, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_centered_keys_are_another_norm_of_causal_maps_and_nearly_the_same_of_others():
    causal = torch.ones(32, 32, dtype=torch.float64).tril()
    causal = causal / causal.sum(dim=1, keepdim=True)
    maps = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    center = torch.eye(32, dtype=torch.float64) - 1 / 32
    for weights in (causal, maps):
        found = low_pass_gain(weights, steps=400, center="keys").item()
        assert found == pytest.approx(torch.linalg.matrix_norm(weights @ center, 2).item(), rel=1e-6)
    assert low_pass_gain(causal, center="keys").item() == pytest.approx(1.35, abs=0.005)
    with pytest.raises(ValueError, match=r"`center` must be one of .*, got 'rows'"):
        low_pass_gain(causal, center="rows")
