"""What neural collapse reads of features without classes, and that random pairs read what all pairs do."""

import pytest
import torch

from lightning_collapse.functional import (
    cdnv,
    collapse_nulls,
    fisher_discriminant_null,
    fisher_discriminant_ratio,
    gnc2,
    gof_error,
    unc3,
    vci,
)
from lightning_collapse.spectral.class_moments import ClassMoments


def noise(classes, dim, per_class, seed=0):
    generator = torch.Generator().manual_seed(seed)
    moments = ClassMoments(classes, dim)
    moments.update(
        torch.randn(classes * per_class, dim, generator=generator), torch.arange(classes * per_class) % classes
    )
    return moments


def test_nulls_are_what_noise_reads():
    classes, dim, per_class = 100, 256, 20
    moments, n = noise(classes, dim, per_class), classes * per_class
    nulls, count = collapse_nulls(n, classes, dim), moments.count
    pairs = cdnv(moments.means, moments.within_traces / count, count)
    weight = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    found = {
        "cdnv": pairs.mean,
        "log_cdnv": pairs.mean_log,
        "gnc2": gnc2(moments.means, count).variance,
        "vci": vci(moments.means, moments.within_scatter / n, count),
        "gof_error": gof_error(moments.means, count),
    }
    for name, value in found.items():
        assert value == pytest.approx(nulls[name], rel=0.05), name
    draws = [unc3(torch.randn(classes, dim), weight) for _ in range(40)]
    assert torch.stack(draws).mean() == pytest.approx(nulls["unc3"], rel=0.1)


def test_fisher_ratio_of_noise_and_of_its_canonical_correlations():
    classes, dim, per_class = 10, 20, 50
    draws = []
    for seed in range(200):
        moments = noise(classes, dim, per_class, seed)
        within = moments.within_scatter / 500
        draws.append(fisher_discriminant_ratio(moments.means, within, moments.count))
    assert torch.stack(draws).mean() == pytest.approx(fisher_discriminant_null(500, classes, dim), rel=0.05)
    between = 50 * (moments.means - moments.means.mean(dim=0)).T @ (moments.means - moments.means.mean(dim=0))
    assert draws[-1] == pytest.approx(torch.trace(torch.linalg.solve(500 * within, between)).item(), rel=1e-9)
    assert collapse_nulls(500, 10, 20)["log_fisher_ratio"] == pytest.approx(-0.9577, abs=1e-4)


def test_fisher_ratio_where_it_says_nothing():
    assert collapse_nulls(25, 5, 20)["log_fisher_ratio"] != collapse_nulls(25, 5, 20)["log_fisher_ratio"]
    means = torch.eye(3, 4, dtype=torch.float64)
    assert fisher_discriminant_ratio(means, torch.zeros(4, 4), torch.full((3,), 20)) == torch.inf
    dead = torch.cat([noise(5, 3, 50).means, torch.zeros(5, 1)], dim=1)  # a unit that is never on
    within = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    expected = fisher_discriminant_ratio(dead[:, :3], within[:3, :3], torch.full((5,), 50))
    assert fisher_discriminant_ratio(dead, within, torch.full((5,), 50)) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("absent", [0, 3])
def test_random_pairs_read_what_all_pairs_do(absent):
    state = torch.get_rng_state()
    means = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    counts = torch.ones(600)
    if absent:
        counts[::absent] = 0
    read = {
        "gnc2": lambda sample: gnc2(means, counts, sample=sample).variance,
        "cdnv": lambda sample: cdnv(means, torch.ones(600), counts, sample=sample).mean,
        "median": lambda sample: cdnv(means, torch.ones(600), counts, sample=sample).median,
        "gof": lambda sample: gof_error(means, counts, sample=sample),
    }
    for name, function in read.items():
        assert function(20_000) == pytest.approx(function(None).item(), rel=0.05), name
        assert function(1000) == function(1000)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_pair_of_a_single_class():
    assert gof_error(torch.ones(4, 3), torch.tensor([0, 5, 0, 0]), sample=10).isnan()
    assert cdnv(torch.ones(4, 3), torch.ones(4), torch.zeros(4), sample=10).pairs == 0
