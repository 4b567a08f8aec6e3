"""Random matrices are never called trained, others are."""

import math

import pytest
import torch
from scipy import integrate
from torch import nn

from lightning_collapse.functional import marchenko_pastur_fit
from lightning_collapse.functional.marchenko_pastur import marchenko_pastur_cdf

SHAPES = [(16, 16), (64, 64), (10, 128), (128, 512), (200, 190), (1, 30)]


@pytest.mark.parametrize("shape", SHAPES)
def test_random_matrices_have_no_outlier(shape: tuple[int, int]) -> None:
    many = 300 if min(shape) < 100 else 20
    gaussian = torch.randn(many, *shape, dtype=torch.float64)
    layers = [nn.Linear(shape[1], shape[0]).weight.detach().double() for _ in range(many)]
    for matrices, variance in ((gaussian, 1.0), (torch.stack(layers), 1 / (3 * shape[1]))):
        found = marchenko_pastur_fit(torch.linalg.svdvals(matrices), shape)
        assert found.outlier_count.tolist() == [0.0] * many
        if min(shape) > 1:
            assert found.variance.mean().item() == pytest.approx(variance, rel=0.05)
            assert found.ks_distance.mean().item() < 3.5 / min(shape)


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("shape", [(128, 128), (96, 300)])
def test_spikes_are_counted_and_do_not_move_the_variance(shape: tuple[int, int], count: int) -> None:
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
    left, right = (torch.linalg.qr(torch.randn(side, count, dtype=torch.float64)).Q for side in shape)
    spikes = torch.linspace(2, 4, count, dtype=torch.float64) * edge
    # noise beside the spikes, so that the count is exact
    noise = torch.randn(shape, dtype=torch.float64)
    noise = noise - left @ (left.T @ noise)
    found = marchenko_pastur_fit(torch.linalg.svdvals(noise + (left * spikes) @ right.T), shape)
    assert found.outlier_count == count
    assert found.outlier_share.item() == pytest.approx(count / min(shape))
    assert found.variance.item() == pytest.approx(1, rel=0.6 if count == 40 else 0.15)


def test_a_trained_layer_is_told_from_its_initialisation() -> None:
    x = torch.randn(512, 32)
    target = x @ torch.randn(32, 4) @ torch.randn(4, 64) / 4
    layer = nn.Linear(32, 64)

    def outliers() -> float:
        return marchenko_pastur_fit(torch.linalg.svdvals(layer.weight.detach()), (64, 32)).outlier_count.item()

    assert outliers() == 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), target).mul(16).backward()
        optimizer.step()
    assert outliers() >= 4


def test_distance_is_that_of_the_empirical_distribution() -> None:
    shape = 50, 80
    values = torch.linalg.svdvals(torch.randn(shape, dtype=torch.float64) + 0.5)
    found = marchenko_pastur_fit(values, shape)
    law = marchenko_pastur_cdf((values.square() / 80 / found.variance).flip(0), 50 / 80).tolist()
    expected = max(max(abs(p - i / 50), abs(p - (i + 1) / 50)) for i, p in enumerate(law))
    assert found.ks_distance.item() == pytest.approx(expected)


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.5, 0.1, 1e-3])
def test_distribution_function_integrates_the_density(ratio: float) -> None:
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max((high - x) * (x - low), 0)) / (2 * math.pi * ratio * x)

    points = torch.linspace(low + 0.05 * (high - low), high, 9, dtype=torch.float64)
    found = marchenko_pastur_cdf(points, ratio)
    for start, end, mass in zip(points[:-1], points[1:], found.diff(), strict=True):
        assert mass.item() == pytest.approx(integrate.quad(density, start, end)[0], abs=1e-7)
    ends = torch.tensor([0.0, low / 2, high, 9.0, math.inf, math.nan], dtype=torch.float64)
    assert marchenko_pastur_cdf(ends, ratio).nan_to_num(-1).tolist() == pytest.approx([0, 0, 1, 1, 1, -1])


def test_degenerate_matrices() -> None:
    zeros = marchenko_pastur_fit(torch.zeros(6), (6, 9))
    assert (zeros.variance, zeros.outlier_count) == (0, 0)
    assert zeros.ks_distance.isnan()
    low_rank = marchenko_pastur_fit(torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0, 0.0]), (6, 9))
    assert low_rank.outlier_count == 2
    orthogonal = marchenko_pastur_fit(torch.ones(40), (40, 40))
    assert orthogonal.outlier_count == 0
    assert orthogonal.ks_distance > 0.4
    assert all(x.isnan() for x in marchenko_pastur_fit(torch.tensor([math.nan, 1.0]), (2, 2)))
    assert all(x.isnan() for x in marchenko_pastur_fit(torch.empty(0), (0, 2)))


def test_batches_and_half_precision() -> None:
    values = torch.linalg.svdvals(torch.randn(3, 12, 20)).half()
    batched = marchenko_pastur_fit(values, (12, 20))
    assert batched.variance.dtype == torch.float32
    for i in range(3):
        assert [x[i] for x in batched] == list(marchenko_pastur_fit(values[i].float(), (20, 12)))


def test_shape_must_fit() -> None:
    with pytest.raises(ValueError, match="`shape` must have 5, the number of singular values"):
        marchenko_pastur_fit(torch.ones(5), (6, 9))
    with pytest.raises(ValueError, match="`ratio` must be in"):
        marchenko_pastur_cdf(torch.ones(1), 1.5)


def test_the_edge_of_an_oblong_matrix() -> None:
    noise = torch.randn(20, 100, 900, dtype=torch.float64)
    edge = marchenko_pastur_fit(torch.linalg.svdvals(noise), (100, 900)).edge
    # sqrt(900) + sqrt(100), and the fluctuation that is allowed for
    assert ((edge > 40) & (edge < 43)).all()
