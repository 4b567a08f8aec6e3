"""LiDAR: an independent reference, closed forms, partial collapse that no rank sees, its null, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from lightning_collapse.functional import eigenvalue_effective_rank, lidar, lidar_null
from lightning_collapse.spectral import singular_values


def naive(views, delta=1e-4, eps=1e-8):
    """By a square root of the inverse of the covariance within, sample by sample, in double precision."""
    q, n, d = views.shape
    means = views.mean(axis=0)
    between, within = np.zeros((d, d)), delta * np.eye(d)
    for i in range(n):
        between += np.outer(means[i] - means.mean(axis=0), means[i] - means.mean(axis=0)) / (n - 1)
        for j in range(q):
            within += np.outer(views[j, i] - means[i], views[j, i] - means[i]) / (n * (q - 1))
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    found = np.linalg.eigvalsh(root @ between @ root).clip(0)
    p = found / found.sum() + eps
    return float(np.exp(-np.sum(p * np.log(p))))


def world(signal, noise, n=1000, q=10, seed=0):
    """Views of samples with these standard deviations of samples and of views along the axes."""
    draw = np.random.default_rng(seed)
    signal, noise = (np.asarray(of, dtype=float) for of in (signal, noise))
    return draw.normal(size=(n, len(signal))) * signal + draw.normal(size=(q, n, len(signal))) * noise


def exact(rank, dim):
    """Scatter between samples that is isotropic in ``rank`` directions, and within them in all, exactly."""
    samples = torch.zeros(2 * dim, dim, dtype=torch.float64)
    for i in range(rank):
        samples[i, i], samples[dim + i, i] = 3.0, -3.0
    # every sample has every deviation once, and its negative
    return [samples + sign * unit for unit in torch.eye(dim, dtype=torch.float64) for sign in (1, -1)]


@pytest.mark.parametrize("shape", [(2, 60, 8), (5, 40, 8), (2, 6, 9), (3, 4, 12)])
def test_value_is_the_reference(shape):
    for offset, scale in ((0, 1), (1000, 1), (3, 0.01)):
        views = offset + scale * world(np.linspace(2, 0.1, shape[2]), np.ones(shape[2]), shape[1], shape[0])
        assert lidar(*torch.from_numpy(views)).rank.item() == pytest.approx(naive(views), rel=1e-7)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_isotropic_scatter_of_a_rank_reads_the_rank(rank):
    found = lidar(*exact(rank, 7))
    # the epsilon of directions without any: ten to the minus eight times its logarithm
    assert found.rank.item() == pytest.approx(rank, rel=2e-6)
    assert found.n == 14


def test_excess_is_the_ratio_of_variances():
    for between in (2.0, 0.5, 0.0):
        found = [lidar(*torch.from_numpy(world([between] * 16, [1.0] * 16, 300, 3, seed))).excess for seed in range(20)]
        mean, error = torch.stack(found).mean().item(), torch.stack(found).std().item() / math.sqrt(20)
        assert mean == pytest.approx(between**2, abs=4 * error)


def test_directions_that_views_do_not_share_do_not_count():
    alive = np.arange(64) < 8
    healthy, ill = world([1.0] * 64, [0.5] * 64), world(alive, np.where(alive, 0.5, 1.0))
    ranks = [float(eigenvalue_effective_rank(singular_values(torch.from_numpy(w[0])))) for w in (healthy, ill)]
    assert ranks[1] == pytest.approx(ranks[0], rel=0.01)
    found = [lidar(*torch.from_numpy(w)) for w in (healthy, ill, world([0.0] * 64, [1.0] * 64))]
    # the eigenvalue of a dead direction is 1 / q, and of a living one 4.1
    assert [round(of.rank.item(), 0) for of in found] == [62, 16, 62]
    assert found[1].excess.item() == pytest.approx(0.5, abs=0.02)
    assert found[2].excess.item() == pytest.approx(0, abs=0.01)  # full, and without any signal
    silent = lidar(*torch.from_numpy(world(alive, np.where(alive, 0.5, 0.0))))
    assert silent.rank.item() == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize(("n", "d", "q"), [(192, 16, 2), (192, 128, 2), (1000, 64, 10), (40, 30, 3), (100, 150, 4)])
def test_null_is_what_noise_reads_and_the_ceiling_of_isotropic_features(n, d, q):
    for between in (0.0, 2.0):
        worlds = [world([between] * d, [1.0] * d, n, q, seed) for seed in range(10)]
        found = [lidar(*torch.from_numpy(views), delta=1e-12).rank.item() for views in worlds]
        assert lidar_null(n, d, q) == pytest.approx(np.mean(found), rel=0.03)


def test_no_null_without_an_inverse():
    assert all(math.isnan(lidar_null(*of)) for of in ((64, 63), (1, 1), (0, 8)))
    assert 1 <= lidar_null(64, 62) < 62


def test_relative_delta_leaves_no_scale():
    views = torch.from_numpy(world(np.linspace(2, 0.1, 12), np.linspace(0.1, 2, 12), 50, 2))
    expected = lidar(*views, relative=True).rank.item()
    unit = views / (views - views.mean(dim=0)).square().sum(dim=(0, 1)).div(50).mean().sqrt()
    assert lidar(*unit).rank.item() == pytest.approx(expected, rel=1e-9)
    for scale in (1e-40, 1e-6, 1e6, 1e40):
        assert lidar(*(scale * views), relative=True).rank.item() == pytest.approx(expected, rel=1e-9)
    assert lidar(*(1e-6 * views)).rank.item() != pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("relative", [True, False])
def test_equal_views_read_the_rank_of_the_samples(relative):
    rows = torch.from_numpy(world(np.linspace(2, 0.1, 12), [0.0] * 12, 50, 1)[0])
    expected = eigenvalue_effective_rank(singular_values(rows)).item()
    assert lidar(rows, rows, rows, relative=relative).rank.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_rows_are_collapsed(dtype):
    for constant in (0.0, 0.1, 1000.0):
        same = torch.full((50, 3), constant, dtype=dtype)
        for relative in (True, False):
            assert lidar(same, same, relative=relative).rank == 1
            assert lidar(same, same, relative=relative).excess.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_views_are_read_in_full_precision(dtype):
    views = torch.from_numpy(2 + world(np.linspace(2, 0.1, 12), np.ones(12), 50, 2)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lidar(*views)
    assert found == lidar(*views) == lidar(*views.double())
    assert found.rank.dtype == torch.float64


def test_samples_that_cannot_be_read_are_left_out():
    views = torch.from_numpy(world(np.ones(4), np.ones(4), 40, 3))
    spoilt, keep = views.clone(), [i for i in range(40) if i not in (0, 7, 9)]
    spoilt[0, 0, 1], spoilt[2, 7, 3], spoilt[1, 9, 0] = torch.nan, torch.inf, -torch.inf
    assert lidar(*spoilt).n == 37
    assert torch.stack(lidar(*spoilt)).tolist() == pytest.approx(torch.stack(lidar(*views[:, keep])).tolist())
    assert lidar(*torch.full((2, 5, 3), torch.nan)).rank.isnan()
    assert lidar(*torch.zeros(2, 0, 3)).rank.isnan()
    assert lidar(*torch.ones(2, 1, 3)).rank.isnan()


@pytest.mark.parametrize("shapes", [[(4, 2)], [(4, 2), (4, 3)], [(4, 2), (3, 2)], [(4,), (4,)], []])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="two or more of shape"):
        lidar(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("delta", [0.0, -1.0, math.nan])
def test_delta_must_be_positive(delta):
    with pytest.raises(ValueError, match=f"must be positive, got {delta}"):
        lidar(torch.ones(4, 2), torch.ones(4, 2), delta=delta)
