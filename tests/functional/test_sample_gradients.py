"""Rank-one shares: unbiased at a few samples, and at norms that differ."""

import pytest
import torch

from lightning_collapse.functional.sample_gradients import rank_one_share

DIM, POINTS = 50, 4000


def _readings(share, samples, spread=0.0):
    """Points of gradients ``mu + noise``, of which ``share`` is the mean's, times log-normal lengths."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(POINTS, samples, DIM, generator=generator, dtype=torch.float64)
    mean = torch.zeros(DIM, dtype=torch.float64)
    mean[0] = (share * DIM / (1 - share)) ** 0.5
    lengths = (spread * torch.randn(POINTS, samples, 1, generator=generator, dtype=torch.float64)).exp()
    gradients = lengths * (mean + noise)
    return gradients.mean(dim=1).square().sum(dim=1), gradients.square().sum(dim=2).mean(dim=1)


@pytest.mark.parametrize(("share", "samples", "plain"), [(0.2, 8, 0.3), (0.01, 8, 0.13375), (0.01, 64, 0.02546875)])
def test_no_bias_at_few_samples(share, samples, plain):
    of_mean, squares = _readings(share, samples)
    assert (of_mean.sum() / squares.sum()).item() == pytest.approx(plain, rel=0.02)  # R + (1 - R) / N
    found = rank_one_share(of_mean, squares, samples).item()
    assert found == pytest.approx(share, abs=0.002)
    assert rank_one_share(of_mean[:1], squares[:1], samples) == rank_one_share(of_mean[0], squares[0], samples)


def test_no_bias_where_norms_differ():
    """(E w)^2 / E w^2 = 1 / e of log-normal lengths: a mean of ratios would be off by more than a third."""
    of_mean, squares = _readings(0.2, 8, spread=1.0)
    truth = 0.2 / torch.e
    assert rank_one_share(of_mean, squares, 8).item() == pytest.approx(truth, rel=0.05)
    ratios = torch.stack([rank_one_share(*pair, 8) for pair in zip(of_mean[:500], squares[:500], strict=True)])
    assert ratios.mean().item() > 1.3 * truth


def test_ends_of_the_range_and_points_of_several_sizes():
    same = torch.tensor([2.0, 3.0])
    torch.testing.assert_close(rank_one_share(same, same, torch.tensor([4, 9])), torch.tensor(1.0))
    nothing = torch.zeros(2)
    torch.testing.assert_close(rank_one_share(nothing, same, 5), torch.tensor(-0.25))
    assert rank_one_share(nothing, nothing, 5).isnan()
    assert rank_one_share(same, same, 1).isnan()
    half = rank_one_share(same.bfloat16(), same.bfloat16(), 4)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="must have one shape"):
        rank_one_share(same, same[0], 4)
    with pytest.raises(ValueError, match="`count` must be a number"):
        rank_one_share(same, same, torch.ones(3))
