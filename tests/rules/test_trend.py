"""Robust trend: straight lines, outliers, the size of its error on noise, and resumption."""

import json
from math import exp, inf, nan

import numpy as np
import pytest
from scipy import stats

from lightning_collapse.rules import Trend
from tests.benchmarks.false_alarms import autoregressive


def fitted(values, steps=None, **arguments):
    trend = Trend(**{"transform": "identity", **arguments})
    for step, value in zip(steps or range(len(values)), values, strict=True):
        trend.update(step, value)
    return trend


@pytest.mark.parametrize("slope", [2.5, -1e-3, 0.0])
def test_a_straight_line(slope):
    steps = [0, 1, 5, 7, 20, 21, 40, 100]
    trend = fitted([3 + slope * step for step in steps], steps)
    assert trend.slope == pytest.approx(slope)
    assert trend.error == pytest.approx(0, abs=1e-12)
    assert trend.direction() == {1: "rising", -1: "falling", 0: "flat"}[int(np.sign(slope))]


def test_growth_of_a_hundredth_a_step():
    trend = fitted([exp(0.01 * step) for step in range(10)], transform="log")
    assert trend.slope == pytest.approx(0.01)


def test_one_in_four_outliers_do_not_move_it():
    values = [0.5 * step + 0.01 * (step * 7 % 5) for step in range(16)]
    for step in (2, 7, 11, 15):
        values[step] = 1e6
    trend = fitted(values)
    assert trend.slope == pytest.approx(0.5, abs=0.01)
    assert trend.direction() == "rising"


def test_only_the_window_counts():
    rising_then_falling = [*range(50), *range(50, 34, -1)]
    assert fitted(rising_then_falling, window=16).slope == pytest.approx(-1)


def test_the_slope_is_that_of_scipy():
    values = autoregressive(np.random.default_rng(0), 0.5, 3, 16, 1)[:, 0]
    assert fitted(values).slope == pytest.approx(stats.theilslopes(values)[0])


@pytest.mark.parametrize(("phi", "low", "high"), [(0.0, 1.0, 1.4), (0.5, 1.1, 1.7), (0.9, 0.9, 1.3)])
def test_the_error_is_that_of_the_slopes(phi, low, high):
    curves = autoregressive(np.random.default_rng(1), phi, None, 16, 400)
    trends = [fitted(curves[:, index]) for index in range(400)]
    spread = np.std([trend.slope for trend in trends])
    assert low < np.sqrt(np.mean([trend.error**2 for trend in trends])) / spread < high


@pytest.mark.parametrize(
    ("df", "phi", "most"), [(None, 0.0, 0.11), (3, 0.0, 0.11), (None, 0.5, 0.2), (None, 0.9, 0.33)]
)
def test_noise_is_mostly_flat(df, phi, most):
    curves = autoregressive(np.random.default_rng(2), phi, df, 16, 400)
    assert np.mean([fitted(curves[:, index]).direction() != "flat" for index in range(400)]) < most


def test_unknown_before_six_points():
    trend = fitted([1.0, 2.0, 3.0, 4.0, 5.0])
    assert np.isnan([trend.slope, trend.error]).all()
    assert trend.direction() == "flat"
    trend.update(5, 6.0)
    assert trend.direction() == "rising"


@pytest.mark.parametrize("bad", [nan, inf, -1.0])
def test_what_is_no_number_is_left_out(bad):
    values = [exp(0.1 * step) for step in range(12)]
    clean = fitted(values, transform="log")
    clean.update(12, bad)
    clean.update(11, 5.0)  # not after the last
    assert clean.state_dict() == fitted(values, transform="log").state_dict()


def test_a_resumed_trend_goes_on_to_the_bit():
    values = autoregressive(np.random.default_rng(3), 0.5, 3, 40, 1)[:, 0].tolist()
    whole, half, resumed = fitted(values), fitted(values[:23]), Trend(transform="identity")
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert (resumed.slope, resumed.error) == (half.slope, half.error)
    for step in range(23, 40):
        resumed.update(step, values[step])
    assert (resumed.slope, resumed.error, resumed.state_dict()) == (whole.slope, whole.error, whole.state_dict())


def test_nothing_raises():
    values = np.random.default_rng(4).choice([0.0, 1e308, -1e308, 5e-324], 200)
    assert np.isfinite(fitted(values).slope)


@pytest.mark.parametrize("arguments", [{"window": 5}, {"transform": "sqrt"}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Trend(**arguments)
