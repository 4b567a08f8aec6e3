"""Powers, extremes and counts are those of all rows, however they arrive and wherever they lie."""

import numpy as np
import pytest
import torch

from lightning_collapse.spectral import EntryMoments
from lightning_collapse.spectral.entry_moments import BINS


def rows(n=300, d=7, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(*batches, masks=None):
    moments = EntryMoments(batches[0].shape[1])
    for i, batch in enumerate(batches):
        moments.update(batch, None if masks is None else masks[i])
    return moments


def central(x):
    x = x.double().numpy()
    return [((x - x.mean()) ** k).sum() for k in (2, 3, 4)]


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e30])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_powers_are_exact_at_any_mean_and_scale_in_single_precision(scale, mean):
    x = ((rows() + mean) * scale).float()
    moments = of(*x.split(64))
    found = moments.about(moments.mean)
    x = x.double()
    std = x.std().item()
    for value, expected, order in zip(found[1:], central(x), (2, 3, 4), strict=True):
        assert value.item() == pytest.approx(expected, abs=1e-4 * x.numel() * std**order)
    assert moments.mean.item() == pytest.approx(x.mean().item(), rel=1e-6, abs=1e-6 * std)
    torch.testing.assert_close(moments.squares, x.square().sum(dim=0), rtol=1e-6, atol=0)
    assert torch.equal(moments.largest, x.abs().amax(dim=0))


def test_any_split_gives_the_same_and_streams_merge():
    x = rows() * 3 + 5
    whole, parts, merged = of(x), of(*x.split([0, 10, 201, 89])), of(x[:40]).merge(of(x[40:] * 1.0))
    for other in (parts, merged):
        torch.testing.assert_close(other.about(whole.mean)[1:], whole.about(whole.mean)[1:], rtol=1e-10, atol=1e-8)
        torch.testing.assert_close(other.squares, whole.squares)
        for name in ("seen", "count", "largest", "histogram"):
            assert torch.equal(getattr(other, name), getattr(whole, name))


def test_padding_and_rows_that_are_no_numbers_do_not_count():
    x = rows(20) + 2
    clean = of(x[5:])
    spoiled = x.clone()
    spoiled[0, 3], spoiled[1, 0] = torch.nan, torch.inf
    mask = torch.arange(20) >= 5
    mask[:2] = True
    found = of(spoiled, masks=[mask])
    assert (found.seen, found.count) == (17, 15)
    assert torch.equal(found.histogram, clean.histogram)
    assert torch.equal(found.largest, clean.largest)
    torch.testing.assert_close(found.about(clean.mean), clean.about(clean.mean), rtol=1e-9, atol=1e-9)


def test_quantiles_and_counts_are_right_to_a_fraction_of_a_bin():
    x = rows(4000, 16)
    moments, sizes = of(x), x.abs().flatten().numpy()
    for share in (0.1, 0.5, 0.99):
        assert moments.quantile(share).item() == pytest.approx(np.quantile(sizes, share), rel=0.01)
    for size in (0.01, 0.5, 2.0):
        assert moments.below(torch.tensor(size)).item() == pytest.approx((sizes < size).sum(), rel=0.02)
    powers = of(2.0 ** torch.arange(-70, 70).double().unsqueeze(1))
    assert powers.histogram.sum() == 140
    assert powers.below(torch.tensor(1.0)) == 63  # from 2 ** -63 to a half; what is smaller counts as zero
    assert powers.histogram[-1] == 6


def test_zeros_are_a_bin_of_their_own():
    moments = of(torch.tensor([[0.0, 0.0, 1.0, 2.0]]))
    assert moments.histogram[0] == 2
    assert len(moments.histogram) == BINS
    assert moments.below(torch.tensor(torch.inf)) == 2


def test_a_wrong_shape_is_refused():
    for shape in ((3,), (3, 5), (2, 3, 7)):
        with pytest.raises(ValueError, match=r"`features` must have shape \(N, 7\), got .* Flatten"):
            EntryMoments(7).update(torch.zeros(shape))
