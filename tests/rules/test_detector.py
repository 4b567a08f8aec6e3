"""Change detector: closed forms, planted shifts, resumption, and a vectorized twin of the recursion."""

import json
from math import inf, nan

import numpy as np
import pytest
from scipy import stats

from lightning_collapse.rules import Detector
from lightning_collapse.rules.scores import cusum_threshold, normal_score, point_threshold
from tests.benchmarks.false_alarms import autoregressive, settings, sums

QUIET = [1.0] * 200


def judged(values, detector=None, **arguments):
    """Statistics of a curve, and its detector."""
    detector = detector or Detector(**{"transform": "identity", **arguments})
    return [detector.update(step, value) for step, value in enumerate(values)], detector


def noise(n, phi=0.0, seed=0):
    return autoregressive(np.random.default_rng(seed), phi, None, n, 1)[:, 0].tolist()


@pytest.mark.parametrize(("points", "threshold"), [(1e3, 5.05), (1e4, 7.35), (1e5, 9.65), (4e5, 11.04), (1e6, 11.96)])
def test_threshold_of_siegmund(points, threshold):
    assert cusum_threshold(points) == pytest.approx(threshold, abs=0.006)


def test_threshold_of_single_points():
    assert stats.norm.sf(point_threshold(1e5)) == pytest.approx(1e-5)


@pytest.mark.parametrize(("arl", "threshold", "error"), [(335, 4.0, 0.05), (931, 5.0, 0.03), (18_960, 8.0, 0.02)])
def test_threshold_against_a_markov_chain(arl, threshold, error):
    assert _run_length(threshold) == pytest.approx(arl, rel=0.005)
    assert cusum_threshold(_run_length(threshold)) == pytest.approx(threshold, abs=error)


def _run_length(threshold, slack=0.5, states=400):
    """Average run length of the CUSUM of standard normal scores, by a Markov chain on a grid."""
    width = 2 * threshold / (2 * states - 1)
    grid = np.arange(states) * width
    upper = stats.norm.cdf(grid[None] + width / 2 - grid[:, None] + slack)
    lower = stats.norm.cdf(grid[None] - width / 2 - grid[:, None] + slack)
    lower[:, 0] = 0
    return np.linalg.solve(np.eye(states) - (upper - lower), np.ones(states))[0]


@pytest.mark.parametrize(("degrees", "error"), [(6, 0.014), (14, 0.0025), (62, 1.5e-4), (125, 5e-5)])
def test_normal_score_against_the_exact_one(degrees, error):
    for score in np.linspace(-3, 3, 25):
        t = stats.t.ppf(stats.norm.cdf(score), degrees)
        assert normal_score(2 * t, 2.0, degrees) == pytest.approx(score, abs=error)


def test_of_a_constant_curve_nothing_is_said():
    statistics, detector = judged([3.7] * 500)
    assert max(statistics) == 0
    assert detector.since == 499


@pytest.mark.parametrize(("side", "size"), [("rise", 1.0), ("fall", -1.0), ("both", 1.0), ("both", -1.0)])
def test_a_step_after_equal_points_is_found_at_its_fourth_point(side, size):
    statistics, detector = judged([*QUIET, *[1.0 + size] * 4], side=side, planned=1000)
    sums = np.multiply(statistics[200:], detector.threshold)
    assert sums == pytest.approx([2.5, 5.0, 7.5, 10.0])
    assert (statistics[-1] >= 1) == (detector.threshold < 10)
    assert (detector.since, detector.direction) == (199, "rise" if size > 0 else "fall")


@pytest.mark.parametrize("side", ["rise", "fall"])
def test_the_other_side_is_not_judged(side):
    statistics, _ = judged([*QUIET, *[0.0 if side == "rise" else 2.0] * 50], side=side)
    assert max(statistics) == 0


@pytest.mark.parametrize("planned", [100, 1000])
def test_a_planted_shift_is_found_soon_and_its_onset_is_known(planned):
    delays, onsets = [], []
    for seed in range(20):
        values = noise(planned, seed=seed)
        half = planned // 2
        statistics, detector = [], Detector(planned=planned, transform="identity")
        for step, value in enumerate(values):
            statistics.append(detector.update(step, value + 4 * (step >= half)))
            if statistics[-1] >= 1:
                break
        delays.append(len(statistics) - half)
        onsets.append(detector.since - half)
    assert min(delays) > 0
    assert np.median(delays) <= 6
    assert max(delays) <= 20
    assert np.median(np.abs(onsets)) <= 2


def test_armed_after():
    for planned, armed_after in [(40, 16), (100, 16), (200, 16), (201, 64), (None, 64)]:
        detector = Detector(planned=planned, transform="identity")
        statistics = [detector.update(step, step == armed_after) for step in range(armed_after + 1)]
        assert max(statistics[:-1]) == 0
        assert statistics[-1] > 0


def test_a_start_without_scale_is_no_reason_for_an_alarm():
    statistics, _ = judged([0.0] * 20 + noise(300, seed=3))
    assert max(statistics) < 1


@pytest.mark.parametrize("side", ["rise", "both"])
@pytest.mark.parametrize("cut", [5, 17, 65, 150, 161, 180, 230])
def test_a_resumed_detector_goes_on_to_the_bit(side, cut):
    values = np.asarray(noise(300, 0.5))
    values[150:] += 5
    values[[70, 160]] = nan
    whole, detector = judged(values, side=side)
    first, half = judged(values[:cut], side=side)
    state = json.loads(json.dumps(half.state_dict()))
    resumed = Detector(transform="identity", side=side)
    resumed.load_state_dict(state)
    state["sums"][0] = inf  # the detector keeps none of it
    assert first + [resumed.update(step, values[step]) for step in range(cut, 300)] == whole
    assert resumed.state_dict() == detector.state_dict()
    assert (resumed.since, resumed.direction) == (detector.since, detector.direction)


def test_the_state_does_not_grow():
    sizes = {len(json.dumps(list(judged(noise(n))[1].state_dict()))) for n in (2, 100, 2000)}
    assert len(sizes) == 1


@pytest.mark.parametrize(("bad", "transform"), [(nan, "identity"), (inf, "log"), (-inf, "identity"), (-1.0, "log")])
def test_what_is_no_number_changes_nothing(bad, transform):
    statistics, detector = judged([*QUIET, 2.0, 2.0], transform=transform)
    before = detector.state_dict()
    assert {detector.update(step, bad) for step in range(202, 300)} == {statistics[-1]}
    after = detector.state_dict()
    assert after.pop("last") is None
    assert after == {name: value for name, value in before.items() if name != "last"}
    assert judged([bad] * 100, transform=transform)[1].since is None


def test_the_first_point_after_a_gap_has_no_score():
    statistics, detector = judged([*QUIET, 2.0, nan, 2.0, 2.0])
    sums = np.multiply(statistics[200:], detector.threshold)
    assert sums == pytest.approx([2.5, 2.5, 2.5, 5.0])


def test_a_new_level_is_accepted_after_64_points_and_judged_again():
    values = noise(900)
    values = [value + 6 * (step >= 300) + 6 * (step >= 700) for step, value in enumerate(values)]
    statistics, _ = judged(values)
    alarms = np.flatnonzero(np.asarray(statistics) >= 1)
    events = [group.tolist() for group in np.split(alarms, np.flatnonzero(np.diff(alarms) > 1) + 1)]
    assert len(events) == 2
    assert 300 < events[0][0] < 310
    assert events[0][-1] < 300 + 64 + 10
    assert 700 < events[1][0] < 710


def test_a_larger_budget_alarms_no_later():
    values = noise(400, seed=2)
    values[200:] = [value + 2 for value in values[200:]]
    thresholds = [Detector(budget=budget).threshold for budget in (0.5, 0.1, 0.01, 0.001)]
    assert thresholds == sorted(thresholds)
    first = [int(np.argmax(np.asarray(judged(values, budget=budget)[0]) >= 1)) for budget in (0.5, 0.1, 0.01, 0.001)]
    assert first == sorted(first)
    assert 200 <= first[1] <= first[-1] < 240


def test_the_budget_is_shared():
    one = Detector(planned=100)
    assert Detector(planned=100, curves=20).points == 20 * one.points
    assert Detector(planned=100, side="both").points == 2 * one.points
    assert Detector(planned=100, curves=20).threshold == pytest.approx(one.threshold + np.log(20))
    assert Detector().threshold == Detector(planned=1000).threshold


@pytest.mark.parametrize(
    "arguments",
    [
        {"budget": 0.0},
        {"budget": nan},
        {"budget": 0.6},
        {"curves": 0},
        {"planned": 0},
        {"side": "up"},
        {"transform": "sqrt"},
    ],
)
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Detector(**arguments)


@pytest.mark.parametrize(
    ("transform", "values"),
    [
        ("identity", [0.0, 1e308, -1e308, 1e-320]),
        ("log", [0.0, 1e308, 5e-324, 1e-12]),
        ("logit", [0.0, 1.0, -1e308, 1e308]),
    ],
)
def test_nothing_raises(transform, values):
    rng = np.random.default_rng(0)
    statistics, detector = judged(rng.choice(values, 1000), transform=transform, side="both")
    assert np.isfinite(statistics).all()
    assert all(np.isfinite(value).all() for value in detector.state_dict().values())


@pytest.mark.parametrize("transform", ["log", "logit"])
def test_units_do_not_matter(transform):
    values = np.exp(noise(500, 0.5))
    values[300:] *= 20
    if transform == "logit":
        shares, odds = values / (1 + values), 3 * values
        curves = [shares, odds / (1 + odds)]
    else:
        curves = [values, 1000 * values]
    one, other = (judged(curve, transform=transform)[0] for curve in curves)
    assert one == pytest.approx(other, abs=1e-9)
    assert max(one) >= 1


@pytest.mark.parametrize("phi", [0.0, 0.9])
@pytest.mark.parametrize("planned", [100, 1000])
def test_the_vectorized_twin_is_the_same(planned, phi):
    how = settings(planned, 1)
    curves = autoregressive(np.random.default_rng(1), phi, 3, planned, 50)
    curves[planned // 2 :, ::2] += 4
    curves[5, 3] = curves[planned // 3, 4] = nan
    twin = sums(curves, how) / how.threshold
    for index in range(50):
        statistics, _ = judged(curves[:, index], planned=planned)
        assert statistics == pytest.approx(twin[:, index].tolist(), abs=1e-6)


@pytest.mark.parametrize("side", ["rise", "both"])
def test_the_budget_holds(side):
    """400 runs of 100 points that are allowed 4 false alarms: 11 would be one in 600."""
    curves = autoregressive(np.random.default_rng(2), 0.5, None, 100, 400)
    alarms = sum(max(judged(curves[:, index], planned=100, side=side)[0]) >= 1 for index in range(400))
    assert alarms <= 10
