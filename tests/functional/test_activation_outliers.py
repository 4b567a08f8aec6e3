"""Outliers: closed forms, an independent reference in double precision, and what formats really do."""

import math

import numpy as np
import pytest
import torch

from lightning_collapse.functional import (
    activation_outliers,
    expected_crest_factor,
    headroom_bits,
    outlier_nulls,
)


def normal(n=2000, d=64, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def reference(x):
    """Straight from the formulas, by NumPy."""
    x = x.double().numpy()
    size, centered = np.abs(x), x - x.mean()
    rms = np.sqrt((x**2).mean())
    r2, peaks = (x**2).mean(axis=0), size.max(axis=0)
    return {
        "abs_max": size.max(),
        "rms": rms,
        "crest_factor": size.max() / rms,
        "kurtosis": (centered**4).mean() / (centered**2).mean() ** 2,
        "neuron_kurtosis": (r2**2).mean() / r2.mean() ** 2,
        "max_median_ratio": peaks.max() / np.median(peaks),
        "outlier_fraction": (size > 10 * rms).mean(),
        "massive": ((size > 100) & (size > 1000 * np.median(size))).sum(),
        "flushed_fraction": ((size > 0) & (size <= size.max() * 2.0**-10 / 448)).mean(),
    }


def spiky(d=64):
    x = normal(d=d)
    x[:, 5] *= 30
    x[::50, 1] += 2000
    return x


@pytest.mark.parametrize("x", [normal(), normal(d=63) + 3, torch.relu(normal()), spiky(), spiky(7), spiky().half()])
def test_readings_are_those_of_the_formulas(x):
    found, expected = activation_outliers(x)._asdict(), reference(x)
    for name in ("abs_max", "rms", "crest_factor", "kurtosis", "neuron_kurtosis", "max_median_ratio"):
        assert found[name].item() == pytest.approx(expected[name], rel=1e-5), name
    assert found["outlier_fraction"].item() == pytest.approx(expected["outlier_fraction"], abs=1e-5)
    assert found["massive"].item() == expected["massive"]
    assert found["flushed_fraction"].item() == pytest.approx(expected["flushed_fraction"], rel=0.05, abs=2e-5)


def test_kurtosis_of_known_distributions():
    signs = torch.ones(4, 6)
    signs[::2] = -1
    assert activation_outliers(signs).kurtosis == 1
    p = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    quantiles = (math.sqrt(2) * torch.erfinv(2 * p - 1)).view(-1, 8)
    assert activation_outliers(quantiles).kurtosis.item() == pytest.approx(3, abs=0.002)
    assert activation_outliers(quantiles.clamp_min(0)).kurtosis.item() == pytest.approx(5.41, abs=0.01)
    assert activation_outliers(p.view(-1, 8)).kurtosis.item() == pytest.approx(1.8, abs=1e-4)
    far = activation_outliers((quantiles + 100).float())
    assert far.kurtosis.item() == pytest.approx(3, abs=0.01)


def test_neuron_kurtosis_goes_from_one_to_the_number_of_neurons():
    equal = torch.ones(3, 512)
    loud, alone = equal.clone(), torch.zeros(3, 512)
    loud[:, 7], alone[:, 7] = 10, 1
    values = [activation_outliers(x).neuron_kurtosis.item() for x in (equal, loud, alone)]
    assert values == pytest.approx([1, 14.4, 512], rel=2e-3)
    loud[:, 7] = 100
    assert activation_outliers(loud).neuron_kurtosis.item() == pytest.approx(463, rel=2e-3)


def test_ratios_do_not_depend_on_the_unit():
    first, other = activation_outliers(spiky()), activation_outliers(spiky() * 2**20)
    for name in set(first._fields) - {"abs_max", "rms", "massive"}:
        assert getattr(first, name).item() == pytest.approx(getattr(other, name).item(), rel=1e-6), name


def test_an_outlier_moves_the_kurtosis_only_when_it_is_massive():
    x = normal(10_000, 100, seed=1)
    for size, expected in ((10, (3 + 1e-2) / (1 + 1e-4) ** 2), (100, (3 + 1e2) / (1 + 1e-2) ** 2)):
        x[0, 0] = size
        assert activation_outliers(x).kurtosis.item() == pytest.approx(expected, rel=0.005)


def test_the_flushed_share_is_what_the_cast_to_e4m3_loses():
    x = normal(4000, 256, seed=2)
    for crest, closed in ((100, 1.74e-4), (1000, 1.74e-3), (10_000, 1.74e-2)):
        x[0, 0] = crest
        scaled = x * (448 / x.abs().max())
        lost = ((scaled.to(torch.float8_e4m3fn).float() == 0) & (x != 0)).double().mean().item()
        found = activation_outliers(x).flushed_fraction.item()
        assert found == pytest.approx(lost, rel=0.03)
        assert found == pytest.approx(closed, rel=0.06)  # of a thousand flushed numbers, on average


def test_headroom_of_every_format():
    largest = {torch.float16: 65504, torch.float8_e5m2: 57344, torch.float8_e4m3fn: 448, torch.bfloat16: 3.39e38}
    for dtype, number in largest.items():
        assert headroom_bits(torch.tensor(1.0), dtype).item() == pytest.approx(math.log2(number), abs=1e-2)
    assert headroom_bits(torch.tensor(32753.0), torch.float16) < 1 < headroom_bits(torch.tensor(32751.0), 65504.0)


def test_nulls_are_what_normals_read():
    crests = [expected_crest_factor(10**k) for k in (5, 6, 7, 8)]
    assert crests == pytest.approx([4.53, 5.00, 5.43, 5.82], abs=0.005)
    n, d, seeds = 40, 12, 400
    found = [activation_outliers(normal(n, d, seed)) for seed in range(seeds)]
    nulls = outlier_nulls(n, d)
    for name in ("crest_factor", "kurtosis", "neuron_kurtosis"):
        values = np.array([getattr(one, name).item() for one in found])
        assert abs(values.mean() - nulls[name]) < 4 * values.std() / math.sqrt(seeds) + 0.005 * nulls[name], name
    ratios = np.array([one.max_median_ratio.item() for one in found])
    assert ratios.mean() == pytest.approx(nulls["max_median_ratio"], rel=0.05)
    large = activation_outliers(normal(20_000, 100))
    expected = outlier_nulls(20_000, 100)
    assert large.flushed_fraction.item() == pytest.approx(expected["flushed_fraction"], abs=1e-5)
    assert large.massive == expected["massive"] == 0
    assert expected["outlier_fraction"] == pytest.approx(1.5e-23, rel=0.02)
    assert outlier_nulls(0, 5) == {}


def test_nothing_to_read_is_nan():
    for empty in (torch.zeros(0, 4), torch.full((3, 4), torch.nan)):
        assert all(value.isnan() for value in activation_outliers(empty))
    constant = activation_outliers(torch.full((1000, 3), 0.1))
    assert constant.kurtosis.isnan()
    assert constant.crest_factor.item() == pytest.approx(1)
    silent = activation_outliers(torch.zeros(3, 4))
    assert silent.abs_max == 0
    assert silent.crest_factor.isnan()
    assert silent.max_median_ratio.isnan()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`features` must have shape \(n, d\), got \(2, 3, 4\)"):
        activation_outliers(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="`entries` must be at least 1, got 0"):
        expected_crest_factor(0)
