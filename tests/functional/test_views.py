"""Recall@1 between views: chance, ties, partial collapse that no rank sees, rows that do not count."""

import pytest
import torch
from torch import nn

from lightning_collapse.functional import alignment, eigenvalue_effective_rank, recall_at_1, uniformity
from lightning_collapse.functional.views import view_statistics
from lightning_collapse.spectral import singular_values


def world(alive, noise, n=1000, d=64, seed=0):
    """Two views of ``alive`` directions of signal; the others hold ``noise`` of the view."""
    draw = torch.Generator().manual_seed(seed)
    signal, *views = (torch.randn(n, d, generator=draw, dtype=torch.float64) for _ in range(3))
    scale = torch.full((d,), noise, dtype=torch.float64)
    scale[:alive] = 0.5
    return [signal * (torch.arange(d) < alive) + scale * view for view in views]


def test_a_partial_collapse_filled_with_noise_shows_in_recall_and_not_in_the_rank():
    healthy, ill = world(64, 0.5), world(8, 1.0)
    ranks = [float(eigenvalue_effective_rank(singular_values(first))) for first, _ in (healthy, ill)]
    assert ranks[1] == pytest.approx(ranks[0], rel=0.01)
    assert recall_at_1(*healthy) > 0.99
    assert recall_at_1(*ill) < 0.03
    assert float(recall_at_1(*world(8, 0.0))) == pytest.approx(0.255, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ties_are_chance(dtype):
    same = torch.full((50, 3), 2.0, dtype=dtype)
    assert recall_at_1(same, same).item() == pytest.approx(1 / 50)


def test_views_that_share_nothing_are_found_by_chance():
    values = [recall_at_1(*torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(i))) for i in range(20)]
    assert torch.stack(values).mean().item() == pytest.approx(1 / 200, abs=4 * (1 / 200 / 4000) ** 0.5)


def test_pairs_that_cannot_be_read_are_no_candidates():
    first, second = world(8, 0.3, n=40)
    spoilt = first.clone(), second.clone()
    spoilt[0][3], spoilt[1][5], spoilt[0][7] = torch.nan, torch.inf, 0.0
    kept = [i for i in range(40) if i not in (3, 5, 7)]
    assert recall_at_1(*spoilt) == recall_at_1(first[kept], second[kept])
    assert view_statistics(*spoilt).tolist() == pytest.approx(view_statistics(first[kept], second[kept]).tolist())
    assert recall_at_1(first[:0], second[:0]).isnan()


def test_statistics_add_up_to_the_measures():
    first, second = world(8, 0.3, n=40)
    pairs, hits, chances, apart, uniform = view_statistics(first, second)
    assert (pairs, chances) == (40, 1)
    assert hits / pairs == recall_at_1(first, second)
    assert apart / pairs == pytest.approx(alignment(first, second).item())
    assert uniform / pairs == pytest.approx(uniformity(first).item())
    together = view_statistics(torch.stack([first, second]), torch.stack([second, first]))
    assert together[0].tolist() == pytest.approx(view_statistics(first, second).tolist())


def test_scale_does_not_matter():
    first, second = (nn.functional.normalize(view).float() for view in world(8, 0.3, n=40))
    for scale in (1e-30, 1e30):
        assert recall_at_1(scale * first, scale * second) == recall_at_1(first, second)


@pytest.mark.parametrize("shapes", [((4, 2), (4, 3)), ((4,), (4,))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="same rows"):
        recall_at_1(*(torch.ones(shape) for shape in shapes))
