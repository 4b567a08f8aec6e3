"""Distances of drift against their closed forms, their nulls, and independent computations in double precision."""

from math import log

import numpy as np
import pytest
import torch
from scipy import stats
from torch.special import ndtr

from lightning_collapse.functional import drift


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mmd2_is_that_of_a_loop_and_on_average_the_closed_form():
    width, d, shift = 2.0, 8, 0.5
    x, y = normal(12, d), normal(9, d, seed=1)

    def kernel(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * width**2))

    (a, b), between = (x.numpy(), y.numpy()), np.mean([kernel(p, q) for p in x.numpy() for q in y.numpy()])
    own = [np.mean([kernel(p, q) for i, p in enumerate(z) for j, q in enumerate(z) if i != j]) for z in (a, b)]
    assert drift.mmd2(x, y, width).item() == pytest.approx(sum(own) - 2 * between, rel=1e-12)
    expected = 2 * (width**2 / (width**2 + 2)) ** (d / 2) * (1 - np.exp(-(shift**2) / (2 * (width**2 + 2))))
    assert expected == pytest.approx(0.00815, abs=1e-5)
    moved = normal(1000, d, seed=3) + torch.eye(d)[0] * shift
    assert drift.mmd2(normal(1000, d, seed=2), moved, width).item() == pytest.approx(expected, abs=0.004)


def test_random_features_estimate_the_same_and_add_up():
    x, y = normal(400, 8), normal(300, 8, seed=1) + 0.5
    width = drift.median_distance(x)
    frequencies = normal(8, 2000, seed=2) / width
    one, other = (drift.fourier_features(of, frequencies) for of in (x, y))
    parts = drift.fourier_sums(other[:100]) + drift.fourier_sums(other[100:])
    found = drift.mmd2_of_sums(drift.fourier_sums(one), parts).item()
    assert found == pytest.approx(drift.mmd2(x, y, width).item(), rel=0.1)
    assert found == pytest.approx(
        drift.mmd2_of_sums(drift.fourier_sums(one), drift.fourier_sums(other)).item(), rel=1e-9
    )
    assert drift.mmd2_of_sums(parts, parts, unbiased=False).item() == 0


def test_the_null_of_mmd2_has_mean_0_and_its_deviation():
    frequencies = normal(4, 64, seed=1) / 2
    features = drift.fourier_features(normal(400, 100, 4, seed=2), frequencies)
    sums = torch.cat([features.sum(dim=1), torch.full((400, 1), 100.0, dtype=torch.float64)], dim=1)
    found = drift.mmd2_of_sums(sums[:200], sums[200:])
    deviation = drift.mmd2_null_deviation(features[0], 100, 100).item()
    assert abs(found.mean().item()) < 4 * deviation / 200**0.5
    assert found.std().item() == pytest.approx(deviation, rel=0.25)


def test_energy_distance_of_a_unit_shift():
    x, y = normal(3000, 1), normal(3000, 1, seed=1) + 1
    assert drift.energy_distance(x, y).item() == pytest.approx(0.5418, abs=0.06)
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert drift.energy_distance(x, y).item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("m", [500, 313])
def test_marginal_distances_are_those_of_scipy(m):
    x, y = normal(3, 500).sort().values, (normal(3, m, seed=1) + 0.3).sort().values
    for i in range(3):
        pair = x[i].numpy(), y[i].numpy()
        assert drift.kolmogorov_smirnov(x, y)[i].item() == pytest.approx(stats.ks_2samp(*pair).statistic, abs=1e-12)
        assert drift.wasserstein1(x, y)[i].item() == pytest.approx(stats.wasserstein_distance(*pair), rel=1e-9)
    large = stats.kstwobign.sf(0.08 * (500 * m / (500 + m)) ** 0.5)
    assert drift.ks_p_value(0.08, 500, m) == pytest.approx(large, rel=1e-9)


def test_marginal_distances_of_a_unit_shift():
    quantiles = torch.special.ndtri((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)
    unit = torch.tensor(0.5, dtype=torch.float64)
    assert drift.wasserstein1(quantiles, quantiles + 1).item() == pytest.approx(1, rel=1e-9)
    ks = drift.kolmogorov_smirnov(quantiles, quantiles + 1).item()
    assert ks == pytest.approx(2 * ndtr(unit).item() - 1, abs=1e-3)
    assert ks == pytest.approx(0.383, abs=1e-3)


def test_nulls_of_marginal_distances():
    x, y = normal(600, 200).sort().values, normal(600, 300, seed=1).sort().values
    assert drift.wasserstein1(x, y).mean().item() == pytest.approx(drift.wasserstein1_null(200, 300), rel=0.06)
    # an empirical supremum lies a little below that of its limit
    assert drift.kolmogorov_smirnov(x, y).mean().item() == pytest.approx(drift.ks_null(200, 300), rel=0.06)
    assert drift.wasserstein1_null(1000, 1000) == pytest.approx(0.0574, abs=4e-4)


def test_psi_and_its_null():
    x, y = normal(1500, 1000).sort().values, normal(1500, 1000, seed=1).sort().values
    found = drift.psi(x, y)
    assert drift.psi_null(1000, 1000) == pytest.approx(0.018)
    assert found.mean().item() == pytest.approx(0.0179, abs=8e-4)  # one half in every bin
    assert (found > 0.034).double().mean().item() == pytest.approx(0.05, abs=0.02)
    p = drift.psi_p_value(found, 1000, 1000)
    assert p[0].item() == pytest.approx(stats.chi2.sf(found[0].item() * 500, 9), rel=1e-9)


def test_frechet_distance_and_its_null():
    found = [drift.frechet_distance(normal(500, 16, seed=i), normal(500, 16, seed=100 + i)).item() for i in range(10)]
    assert np.mean(found) == pytest.approx(drift.frechet_null(500, 500, 16), rel=0.08)
    assert drift.frechet_null(1000, 1000, 64) == pytest.approx(2.208)
    x = normal(200, 5)
    moved = drift.frechet_distance(x, 3 * x + 2).item()
    mean, covariance = x.mean(dim=0), torch.cov(x.mT)
    expected = (2 * mean + 2).square().sum() + 4 * covariance.trace()
    assert moved == pytest.approx(expected.item(), rel=1e-9)


def test_cka_of_independent_features_and_of_a_rotation():
    x, y = normal(256, 512), normal(256, 512, seed=1)
    assert drift.cka(x, y).item() == pytest.approx(drift.cka_null(256, 512), abs=0.005)
    assert drift.cka_null(256, 512) == pytest.approx(2 / 3)
    few = normal(20000, 2 * 6 * 10).view(2, 20000, 6, 10)
    x_few, y_few = few - few.mean(dim=2, keepdim=True)
    across, own = (torch.linalg.matrix_norm(x_few.mT @ other).square().mean() for other in (y_few, x_few))
    assert (across / own).item() == pytest.approx(drift.cka_null(6, 10), abs=0.005)
    assert drift.debiased_cka(x, y).item() == pytest.approx(0, abs=0.01)
    rotation = torch.linalg.qr(normal(512, 512, seed=2)).Q
    assert drift.debiased_cka(x, x @ rotation * 5 + 1000).item() == pytest.approx(1, rel=1e-6)
    assert drift.debiased_cka(x, torch.full_like(y, 7.0)).isnan()


def test_overlap_and_its_null():
    found = [
        drift.subspace_overlap(*(drift.top_directions(normal(400, 64, seed=2 * i + j), 8) for j in range(2))).item()
        for i in range(20)
    ]
    assert np.mean(found) == pytest.approx(drift.overlap_null(8, 64), abs=0.03)
    decay = 1 / torch.arange(1, 65)
    bases = [drift.top_directions(normal(4000, 64, seed=j) * decay, 8) for j in range(2)]
    assert drift.subspace_overlap(*bases).item() > 0.8


def test_output_kl_is_that_of_torch():
    p, q = normal(20, 5), normal(20, 5, seed=1)
    expected = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)
    assert drift.output_kl(p, q).item() == pytest.approx(expected.item(), rel=1e-12)
    assert drift.output_kl(p, p).item() == 0


def test_permutations_find_a_shift_and_can_be_repeated():
    frequencies = normal(4, 32, seed=1) / 2
    x, y = (drift.fourier_features(normal(60, 4, seed=i), frequencies) for i in (2, 3))
    assert drift.permutation_p_value(x, y, seed=1) == drift.permutation_p_value(x, y, seed=1)
    moved = drift.fourier_features(normal(60, 4, seed=3) + 1, frequencies)
    assert drift.permutation_p_value(x, moved).item() == pytest.approx(1 / 201)


def autoregressions(phi, n, runs, seed=0):
    noise, curve = normal(n + 300, runs, seed=seed), torch.zeros(runs, dtype=torch.float64)
    kept = []
    for step in range(n + 300):
        curve = phi * curve + noise[step]
        kept.append(curve)
    return torch.stack(kept[300:], dim=1)


def test_equilibrium_of_an_autoregression():
    n, phi = 50, 0.9
    curves = autoregressions(phi, n, 2000)
    found = drift.equilibrium(curves + 5)
    assert found.phi.mean().item() == pytest.approx(0.890, abs=0.012)
    assert found.phi.median().item() == pytest.approx(0.892, abs=0.02)
    one = curves[0].numpy()
    slope = stats.linregress(one[:-1], one[1:])
    assert found.phi[0].item() == pytest.approx((n * slope.slope + 1) / (n - 3), rel=1e-9)
    assert found.statistic[0].item() == pytest.approx((slope.slope - 1) / slope.stderr, rel=1e-9)
    assert found.level[found.bounded].mean().item() == pytest.approx(5, abs=0.2)
    assert found.level[~found.bounded].isnan().all()
    late = drift.equilibrium(autoregressions(phi, 200, 800))
    assert late.bounded.double().mean().item() == pytest.approx(0.85, abs=0.05)
    assert late.half_life[late.bounded].median().item() == pytest.approx(log(0.5) / log(phi), rel=0.15)
    sd = (1 - phi**2) ** -0.5
    assert late.error[late.bounded].median().item() / sd == pytest.approx(0.308, rel=0.2)


def test_a_random_walk_passes_for_bounded_in_one_of_twenty_fits():
    for n, limit in ((50, -2.92), (100, -2.89), (250, -2.87)):
        assert drift.dickey_fuller_limit(n) == pytest.approx(limit, abs=0.005)
    walks = drift.equilibrium(normal(10000, 50).cumsum(dim=1))
    assert walks.bounded.double().mean().item() == pytest.approx(0.05, abs=0.008)


def test_few_or_constant_points_are_not_bounded():
    for curve in (normal(49), torch.ones(60), torch.tensor([float("nan")] * 60)):
        found = drift.equilibrium(curve)
        assert not found.bounded
        assert found.level.isnan()
