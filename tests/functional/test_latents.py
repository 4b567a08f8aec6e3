"""Latents against plain float64 loops, the closed forms of linear models, and channels of known capacity."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from examples.latents.linear_vae import EIGENVALUES, LEVELS, hierarchical_vaes, linear_vae, predicted
from lightning_collapse.functional import (
    conditional_spectrum,
    gaussian_divergence,
    latent_readings,
    latent_sums,
    linear_vae_divergence,
    mutual_information,
    unit_kinds,
    whitened_posterior,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(mean, log_variance, *more):
    return {name: value.item() for name, value in latent_readings(latent_sums(mean, log_variance, *more)).items()}


def test_the_divergence_is_that_of_torch_and_that_of_a_prior_after_whitening():
    mean, log_variance, m, log_s2 = (drawn(5, 3, seed=seed) for seed in range(4))
    posterior = Normal(mean, (log_variance / 2).exp())
    unit = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    assert torch.allclose(gaussian_divergence(mean, log_variance), unit, rtol=1e-12, atol=1e-14)
    prior = kl_divergence(posterior, Normal(m, (log_s2 / 2).exp()))
    assert torch.allclose(gaussian_divergence(*whitened_posterior(mean, log_variance, m, log_s2)), prior, atol=1e-12)
    tiny = gaussian_divergence(torch.tensor([1e-4]), torch.tensor([1e-4]))  # two squares of 1e-4, in float32
    assert tiny.item() == pytest.approx(0.5e-8 + 0.25e-8, rel=1e-3)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_readings_are_those_of_plain_loops(shift):
    mean, log_variance = drawn(40, 3) * torch.tensor([1.0, 0.05, 0.3]) + shift, 0.3 * drawn(40, 3, seed=1) - 1
    found, variance = read(mean, log_variance), log_variance.exp()
    units = range(3)
    spread = [mean[:, u].var(correction=0).item() for u in units]
    kl = [(0.5 * (mean[:, u] ** 2 + variance[:, u] - 1 - log_variance[:, u])).mean().item() for u in units]
    ceiling = [0.5 * (math.log(variance[:, u].mean() + spread[u]) - log_variance[:, u].mean().item()) for u in units]
    rest = [kl_divergence(Normal(mean[:, u].mean(), (variance[:, u].mean() + spread[u]) ** 0.5), Normal(0.0, 1.0))
            for u in units]  # fmt: skip
    assert found["kl"] == pytest.approx(sum(kl), rel=1e-9)
    assert found["information_ceiling"] == pytest.approx(sum(ceiling), rel=1e-6)
    assert found["largest_ceiling"] == pytest.approx(max(ceiling), rel=1e-6)
    assert found["prior_mismatch"] == pytest.approx(float(sum(rest)), rel=1e-6)
    assert found["active_units"] == sum(value > 0.01 for value in spread)
    assert found["mean_variance"] == pytest.approx(sum(spread) / 3, rel=1e-6)
    assert found["mean_share"] == pytest.approx((mean**2).mean(dim=0).sum().item() / 2 / sum(kl), rel=1e-9)


@pytest.mark.parametrize("ratio", [0.0, 0.0102, 0.5, 9.0])
def test_a_linear_model_at_its_optimum(ratio):
    """Of one unit with decoder weight w and noise s, w^2 / s^2 given: divergence, spread and activity are known."""
    n = 4000
    x = drawn(n)
    mean = ((x - x.mean()) / x.std(correction=0) * (ratio / (1 + ratio)) ** 0.5).unsqueeze(1)
    found = read(mean, torch.full((n, 1), -math.log(1 + ratio), dtype=torch.float64))
    assert found["kl"] == pytest.approx(0.5 * math.log(1 + ratio), abs=1e-12)
    assert found["kl"] == pytest.approx(linear_vae_divergence(torch.tensor(1 + ratio)).item(), abs=1e-6)
    assert found["information_ceiling"] == pytest.approx(found["kl"], abs=1e-12)
    assert found["active_units"] == (ratio >= 0.0102)
    assert found["passive"] == (1 / (1 + ratio) >= 0.9)


def test_a_prior_and_a_point_are_told_apart_where_the_divergence_alone_is_not():
    same = torch.zeros(50, 2, dtype=torch.float64)
    for variance, kl in ((1.0, 0.0), (1e-2, 1.81), (1e-4, 4.11), (1e-6, 6.41)):
        found = read(same, same + math.log(variance))
        assert found["kl"] == pytest.approx(2 * kl, abs=0.01)
        assert found["information_ceiling"] == pytest.approx(0, abs=1e-12)
        assert found["at_prior"] == (variance == 1)
        assert found["at_point"] == (variance < 1e-4)
    assert read(drawn(50, 2), same - 14)["at_point"] == 0


def test_kinds_of_units_by_what_their_variance_does():
    half = torch.tensor([1.0] * 25 + [0.01] * 25, dtype=torch.float64)
    assert (half.mean().item(), half.var(correction=0).item()) == pytest.approx((0.505, 0.245), abs=1e-3)
    kinds = unit_kinds(torch.tensor([0.505, 0.05, 1.0, 0.5, 1.2, math.nan]), torch.tensor([0.245, 0, 0.05, 0, 0, 0]))
    assert [kind.nonzero().flatten().tolist() for kind in kinds] == [[1], [2], [0, 3, 4]]
    for share, expected in ((1 / 11, 1.0), (1 / 10, 0.0)):  # passive for a share of the inputs, 0.01 for the others
        rows = torch.full((110, 1), 0.01, dtype=torch.float64)
        rows[: round(110 * share)] = 1.0
        assert read(torch.zeros_like(rows), rows.log())["active"] == expected


def test_rows_without_a_variance_are_left_out_and_nothing_else():
    mean, log_variance = drawn(9, 2), drawn(9, 2, seed=1)
    spoiled, counted = mean.clone(), torch.ones(9, dtype=torch.bool)
    spoiled[2, 0], counted[5] = math.nan, False
    log_variance[4, 1], log_variance[5, 0] = 1e4, math.inf
    kept = [0, 1, 3, 6, 7, 8]
    found = read(spoiled, log_variance, counted)
    assert found.pop("nonfinite") == 2
    expected = read(mean[kept], log_variance[kept])
    del expected["nonfinite"]
    assert found == pytest.approx(expected)
    for shapes in (((3,), (3,)), ((3, 2), (3, 1)), ((3, 0), (3, 0))):
        with pytest.raises(ValueError, match=r"`mean` and `log_variance` must both have shape \(N, U\).* got"):
            latent_sums(*(torch.zeros(shape) for shape in shapes))


def naive_information(mean, log_variance, z):
    q = Normal(mean, (log_variance / 2).exp())
    logs = torch.stack([q.log_prob(row).sum(dim=1) for row in z])  # of every sample under every posterior
    own, n = logs.diagonal(), len(z)
    rest = torch.stack([logs[i, [j for j in range(n) if j != i]].exp().mean().log() for i in range(n)])
    return (own - logs.exp().mean(dim=1).log()).mean().item(), (own - rest).mean().item()


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_both_estimates_of_information_are_those_of_plain_loops(shift):
    mean, log_variance, noise = drawn(12, 3) + shift, drawn(12, 3, seed=1) - 1, drawn(12, 3, seed=2)
    z = mean + (log_variance / 2).exp() * noise
    found = [value.item() for value in mutual_information(mean, log_variance, z)]
    assert found == pytest.approx(naive_information(mean, log_variance, z), rel=1e-8)
    counted = torch.arange(12) != 3
    own = [value.item() for value in mutual_information(mean, log_variance, z, counted)]
    assert own == pytest.approx(naive_information(mean[counted], log_variance[counted], z[counted]), rel=1e-8)
    assert all(value.isnan() for value in mutual_information(mean[:1], log_variance[:1], z[:1]))


@pytest.mark.parametrize(("units", "rho2", "truth"), [(2, 0.5, 0.693), (8, 0.5, 2.773)])
def test_they_bracket_the_capacity_of_a_channel(units, rho2, truth):
    """Of x = N(0, I) and z with squared correlation rho2 of every unit; means of a hundred batches of 64."""
    generator, sums = torch.Generator().manual_seed(0), torch.zeros(2, dtype=torch.float64)
    log_variance = torch.full((64, units), math.log(1 - rho2))
    for _ in range(100):
        mean, noise = (torch.randn(64, units, generator=generator) for _ in range(2))
        mean = rho2**0.5 * mean
        sums += torch.stack(mutual_information(mean, log_variance, mean + (1 - rho2) ** 0.5 * noise)) / 100
    assert sums[0] <= truth <= sums[1]
    assert sums[1] - sums[0] < (0.06 if units == 2 else 0.8)
    assert 0.5 * units * -math.log(1 - rho2) == pytest.approx(truth, abs=1e-3)


def test_far_apart_the_lower_estimate_ends_at_the_logarithm_of_the_batch():
    mean = 1e3 * drawn(16, 4)
    lower, upper = mutual_information(mean, torch.zeros(16, 4), mean)
    assert lower.item() == pytest.approx(math.log(16))
    assert upper > 100


def test_a_condition_leaves_the_eigenvalues_that_training_would_show():
    x = drawn(400, 2)
    y = x @ drawn(2, 4, seed=1) + drawn(400, 4, seed=2) * torch.tensor([1.4, 1.0, 0.6, 0.3]) + 7
    basis = torch.cat([x, torch.ones(400, 1)], dim=1)
    rest = y - basis @ torch.linalg.lstsq(basis, y).solution
    expected = torch.linalg.eigvalsh(rest.T @ rest / 400).flip(0) / 0.5
    assert torch.allclose(conditional_spectrum(x, y, noise=0.5), expected, rtol=1e-8)
    values = torch.tensor([2.18, 1.02, 0.371, 0.088]) / 0.5
    assert linear_vae_divergence(values).tolist() == pytest.approx([0.736, 0.3565, 0, 0], abs=1e-3)
    x[3] = math.nan
    assert conditional_spectrum(x, y).isnan().all()


def test_training_ends_where_the_closed_forms_of_one_level_and_of_two_say():
    trained, found = linear_vae(0.5, 1500)
    ratios = torch.tensor(EIGENVALUES, dtype=torch.float64) / 0.5
    assert torch.allclose(trained, linear_vae_divergence(ratios), rtol=1e-3, atol=1e-4)
    assert found["active_units"] == 2
    levels = [level for level in LEVELS if level not in LEVELS[1:3]]  # those take four times as long
    weights = zip(*(values.tolist() for values in hierarchical_vaes(levels, 1200)[:2]), strict=True)
    for level, found_weights in zip(levels, weights, strict=True):
        assert found_weights == pytest.approx(predicted(level), rel=1e-3, abs=1e-3), level
