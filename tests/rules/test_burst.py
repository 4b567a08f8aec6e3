"""Burst: jumps of level and of falling curves, gaps, resumption, and its budget."""

import json
from math import inf, nan

import numpy as np
import pytest

from lightning_collapse.rules import Burst
from tests.benchmarks.false_alarms import autoregressive


def judged(values, burst=None, **arguments):
    burst = burst or Burst(**{"planned": 100, "transform": "identity", **arguments})
    return [burst.update(step, value) for step, value in enumerate(values)], burst


def noise(n, phi=0.0, df=None, seed=0):
    return autoregressive(np.random.default_rng(seed), phi, df, n, 1)[:, 0]


@pytest.mark.parametrize("tau", [20, 100])
def test_a_jump_of_a_falling_loss(tau):
    found = 0
    for seed in range(20):
        loss = np.log(2 + 3 * np.exp(-np.arange(100) / tau)) + 0.02 * noise(100, 0.5, seed=seed)
        loss[60:] += 0.3
        statistics, _ = judged(np.exp(loss), transform="log")
        found += statistics[60] >= 1
    assert found >= 19


@pytest.mark.parametrize(("side", "up", "down"), [("rise", 1, 0), ("fall", 0, 1), ("both", 1, 1)])
def test_sides(side, up, down):
    for sign, expected in ((1, up), (-1, down)):
        statistics, _ = judged([*noise(40), 20.0 * sign], side=side)
        assert (statistics[-1] >= 1) == expected


def test_nothing_before_the_17th_difference():
    statistics, _ = judged([*noise(17), 1e6])
    assert statistics[:17] == [0.0] * 17
    assert statistics[17] >= 1


def test_a_constant_curve_and_a_curve_of_few_values():
    assert max(judged([0.3] * 100)[0]) == 0
    shares = np.where(np.arange(100) % 9 == 0, 0.51, 0.5)  # most differences are 0
    assert max(judged(shares)[0]) < 1


@pytest.mark.parametrize("bad", [nan, inf, -1.0])
def test_a_gap_has_no_difference(bad):
    statistics, burst = judged([*np.exp(noise(40)), bad], transform="log")
    before = burst.state_dict()["differences"]
    assert statistics[-1] == 0
    assert burst.update(41, 1e9) == 0
    assert burst.state_dict()["differences"] == before


def test_a_resumed_burst_goes_on_to_the_bit():
    values = noise(80, df=3).tolist()
    whole, burst = judged(values)
    first, half = judged(values[:33])
    resumed = Burst(planned=100, transform="identity")
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert first + [resumed.update(step, values[step]) for step in range(33, 80)] == whole
    assert resumed.state_dict() == burst.state_dict()


def test_the_budget_holds_for_gaussian_noise():
    """500 runs that are allowed 5 false alarms: 12 would be one in 200."""
    curves = autoregressive(np.random.default_rng(1), 0.5, None, 100, 500)
    assert sum(max(judged(curves[:, index])[0]) >= 1 for index in range(500)) <= 11


def test_a_shared_budget_takes_a_larger_jump():
    thresholds = [Burst(planned=100, curves=curves).threshold for curves in (1, 20, 200)]
    assert thresholds == sorted(thresholds)
    assert Burst(planned=100, side="both").threshold == Burst(planned=200).threshold


def test_nothing_raises():
    values = np.random.default_rng(4).choice([0.0, 1e308, -1e308, 5e-324], 200)
    assert np.isfinite(judged(values)[0]).all()


@pytest.mark.parametrize("arguments", [{"side": "up"}, {"transform": "sqrt"}, {"budget": 2.0}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Burst(**arguments)
