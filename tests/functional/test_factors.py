"""Subclasses, nuisance factors and lost factors, against least squares and neighbours written out with numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.functional.factors import (
    linear_probe,
    nuisance_cdnv,
    nuisance_shares,
    subclass_accuracy,
    subclass_cdnv,
)
from lightning_collapse.metrics import LinearProbe, NuisanceShares
from lightning_collapse.spectral import ClassMoments

F64 = torch.float64


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(seed: int, n: int, classes: int) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def vote(x: np.ndarray, y: np.ndarray, fine: np.ndarray, k: int) -> float:
    """Neighbours one by one; of equal votes that of the nearest decides."""
    right = 0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i and y[j] == y[i]]
        near = [int(fine[j]) for j in sorted(others, key=lambda j: np.linalg.norm(x[i] - x[j]))[:k]]
        right += max(near, key=lambda s: (near.count(s), -near.index(s))) == fine[i]
    return right / len(x)


def test_subclass_accuracy_is_the_vote_of_the_neighbours_within_the_class() -> None:
    y, fine = labels(0, 60, 2), labels(1, 60, 3)
    x = rows(2, 60, 4) + rows(3, 6, 4)[3 * y + fine]
    for k in (1, 5):
        found = subclass_accuracy(x, y, fine, k)
        assert found.accuracy == pytest.approx(vote(x.numpy(), y.numpy(), fine.numpy(), k), rel=1e-12)
        assert found.n == 60
    bad = torch.cat([x, torch.full((1, 4), torch.nan, dtype=F64)])
    again = subclass_accuracy(bad, torch.cat([y, y[:1]]), torch.cat([fine, fine[:1]]), 5)
    assert again == found
    assert subclass_accuracy(x[:4], y[:4], fine[:4], k=4).accuracy.isnan()


def test_the_null_of_subclass_accuracy_is_what_collapse_leaves() -> None:
    state = torch.get_rng_state()
    y, fine = torch.zeros(400, dtype=torch.int64), (torch.arange(400) % 4).clamp_max(2)
    found = subclass_accuracy(rows(4, 400, 6), y, fine, k=1, permutations=40)
    n = torch.bincount(fine).double()
    closed = (n * (n - 1)).sum() / (400 * 399)  # for one neighbour
    assert abs(found.null - closed) < 4 * found.error / 40**0.5
    assert abs(found.accuracy - found.null) < 4 * found.error
    distinct = subclass_accuracy(rows(4, 400, 6) + 3 * rows(5, 3, 6)[fine], y, fine, k=1)
    assert distinct.accuracy - distinct.null > 8 * distinct.error
    assert torch.equal(torch.get_rng_state(), state)


def test_subclass_cdnv_is_over_pairs_within_a_class() -> None:
    means, variances = rows(6, 6, 5), rows(7, 6).square()
    counts, classes = torch.tensor([9, 4, 7, 5, 3, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4)]
    values = [(variances[i] + variances[j]) / (2 * (means[i] - means[j]).square().sum()) for i, j in pairs]
    found = subclass_cdnv(means, variances, counts, classes)
    torch.testing.assert_close(found.mean, torch.stack(values).mean(), rtol=1e-12, atol=0)
    nulls = [1 / (1 / counts[i] + 1 / counts[j]) - 0.5 for i, j in pairs]
    assert found.null == pytest.approx(np.mean(nulls), rel=1e-6)
    assert (found.pairs, found.unresolved) == (4, 0)


def test_the_null_of_subclass_cdnv() -> None:
    fine, values = torch.arange(100) % 10, []
    fine = torch.where(fine == 9, 8, fine)  # one of twice the rows
    for seed in range(20):
        moments = ClassMoments(9, 256, scatter=False)
        moments.update(rows(200 + seed, 100, 256), fine)
        variances = moments.within_traces / moments.count
        found = subclass_cdnv(moments.means, variances, moments.count, torch.zeros(9, dtype=torch.int64))
        values.append(found.mean.item())
    # a ratio of means: the mean ratio is larger by D / (D - 2)
    assert np.mean(values) == pytest.approx(found.null.item() * 256 / 254, rel=0.02)


def sums_of_squares(x: np.ndarray, y: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Of nested regressions on dummy variables: mean, classes, then domains, then cells."""
    hot_y, hot_d = np.eye(y.max() + 1)[y], np.eye(domain.max() + 1)[domain]
    cells = (hot_y[:, :, None] * hot_d[:, None, :]).reshape(len(x), -1)
    designs = [np.ones((len(x), 1)), hot_y, np.hstack([hot_y, hot_d]), cells]
    left = [((x - design @ np.linalg.lstsq(design, x, rcond=None)[0]) ** 2).sum() for design in designs]
    return -np.diff([*left, 0.0]) / left[0]


def test_nuisance_shares_are_those_of_nested_regressions() -> None:
    y, domain = labels(9, 90, 3), labels(10, 90, 4)
    keep = (y != 2) | (domain > 1)  # two empty cells
    y, domain = y[keep], domain[keep] * (domain[keep] > 0)
    x = rows(11, len(y), 5) + rows(12, 3, 5)[y] + 2 * rows(13, 4, 5)[domain] + rows(14, 12, 5)[4 * y + domain] + 1e6
    metric = NuisanceShares(3, 4, 5)
    for part in torch.arange(len(y)).split(17):
        metric.update(x[part], y[part].to(torch.uint8), domain[part])
    metric.update(x[:2] + 99, torch.tensor([0, 3]), torch.tensor([-1, 0]))  # in no cell
    found = metric.compute()
    shares = [found[name].item() for name in ("between_class", "between_domain", "interaction", "residual")]
    assert shares == pytest.approx(sums_of_squares((x - 1e6).numpy(), y.numpy(), domain.numpy()), rel=1e-8)
    assert sum(shares) == pytest.approx(1, rel=1e-12)
    assert found["class_null"] == pytest.approx(2 / (len(y) - 1))
    assert found["n"] == len(y)


def test_the_null_of_nuisance_shares() -> None:
    x, drawn = rows(15, 60, 3), []
    y, domain = labels(16, 60, 3), labels(17, 60, 4)
    for seed in range(150):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        cells = ClassMoments(12, 3, scatter=False)
        cells.update(x[order], 4 * y + domain)
        parts = (cells.count.view(3, 4), cells.means.view(3, 4, 3), cells.within_traces.view(3, 4))
        drawn.append(nuisance_shares(*parts).shares)
    values = torch.stack(drawn)
    error = values.std(dim=0) / len(drawn) ** 0.5
    null = nuisance_shares(*parts).null
    assert ((values.mean(dim=0) - null).abs() < 4 * error).all()
    assert null[0] == pytest.approx(2 / 59)


def test_nuisance_cdnv_is_that_of_the_domains() -> None:
    y, domain = labels(18, 80, 3), labels(19, 80, 2)
    x = rows(20, 80, 4) + rows(21, 2, 4)[domain]
    cells = ClassMoments(6, 4, scatter=False)
    cells.update(x, 2 * y + domain)
    parts = (cells.count.view(3, 2), cells.means.view(3, 2, 4), cells.within_traces.view(3, 2))
    groups = [x[domain == d] for d in range(2)]
    spread = sum(((group - group.mean(dim=0)) ** 2).sum(dim=1).mean() for group in groups)
    expected = spread / (2 * (groups[0].mean(dim=0) - groups[1].mean(dim=0)).square().sum())
    torch.testing.assert_close(nuisance_cdnv(*parts).mean, expected, rtol=1e-10, atol=0)


def test_linear_probe_is_held_out_ridge_regression() -> None:
    x = rows(22, 70, 6) * torch.logspace(0, -2, 6, dtype=F64) + 1000
    y = torch.cat([x[:, :1] - 1000 + 0.1 * rows(23, 70, 1), rows(24, 70, 1)], dim=1)
    found = linear_probe(x[:40], y[:40], x[40:], y[40:], ridge=0.01).numpy()
    train, targets = (part[:40].numpy() - part[:40].numpy().mean(axis=0) for part in (x, y))
    penalty = 0.01 * (train**2).sum() / 6 * np.eye(6)
    weight = np.linalg.solve(train.T @ train + penalty, train.T @ targets)
    held = y[40:].numpy() - y[:40].numpy().mean(axis=0)
    left = held - (x[40:].numpy() - x[:40].numpy().mean(axis=0)) @ weight
    assert found == pytest.approx(1 - (left**2).sum(axis=0) / (held**2).sum(axis=0), rel=1e-8)


def test_the_null_of_the_linear_probe() -> None:
    errors, totals = 0.0, 0.0
    for seed in range(60):
        x, y = rows(100 + seed, 440, 8), rows(900 + seed, 440, 1)
        found = linear_probe(x[:40], y[:40], x[40:], y[40:], ridge=0.0)
        total = (y[40:] - y[:40].mean()).square().sum()
        errors, totals = errors + (1 - found[0]) * total, totals + total
    assert 1 - errors / totals == pytest.approx(-8 / (40 - 8 - 2), rel=0.15)


def test_a_suppressed_factor_is_named() -> None:
    shape, color = labels(25, 600, 3), labels(26, 600, 4)
    codes = rows(27, 3, 16)[shape]  # of the color nothing is left but noise
    probe = LinearProbe(16, {"shape": 3, "color": 4})
    held = torch.arange(600) % 3 == 0
    factors = torch.stack([shape, color], dim=1)
    for part in torch.arange(600).split(100):
        probe.update(codes[part] + 0.1 * rows(28, 600, 16)[part], factors[part], held[part])
    probe.update(torch.full((2, 16), 1e6), torch.tensor([[-100, 0], [0, 4]]))  # a label is missing
    found = probe.compute()
    assert found["shape"] > 0.9
    assert found["color"] < 0.05
    assert found["n"] == 400


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`counts`, `means` and `scatters` must have shapes"):
        nuisance_shares(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="`labels` and `subclasses` must have shapes"):
        subclass_accuracy(torch.ones(3, 2), torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        subclass_accuracy(torch.ones(3, 2), torch.ones(3), torch.ones(3), k=0)
    with pytest.raises(ValueError, match="`classes` must have shape"):
        subclass_cdnv(torch.ones(3, 2), torch.ones(3), torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="`ridge` must not be negative"):
        linear_probe(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2), ridge=-1)
    for factors in ({}, {"n": 2}, {"color": 1}):
        with pytest.raises(ValueError, match="`factors` must give names"):
            LinearProbe(2, factors)
    with pytest.raises(ValueError, match="`features` and integer `factors` must have shapes"):
        LinearProbe(2, {"color": 2}).update(torch.ones(3, 2), torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("held_out", [torch.ones(4), torch.tensor([True, False]), 1])
def test_which_rows_are_held_out_is_boolean(held_out):
    with pytest.raises(ValueError, match=r"`held_out` must be boolean of shape \(4,\), or one boolean, got torch"):
        LinearProbe(3, {"a": 2}).update(torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.long), held_out)
