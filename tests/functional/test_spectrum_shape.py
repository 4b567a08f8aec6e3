"""Options and corners of the shapes of spectra."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import alpha_req, alpha_req_fit, condition_number, isotropy, top_k_share
from lightning_collapse.spectral import Moments, Spectrum, singular_values, spectrum_of

RANKS = torch.arange(1, 121, dtype=torch.float64)


def noise(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("k", "expected"), [(1, 0.5), (2, 0.75), (3, 0.95), (4, 1.0), (9, 1.0)])
def test_top_k_share(k: int, expected: float) -> None:
    assert top_k_share(torch.tensor([10.0, 5.0, 4.0, 1.0]).sqrt(), k=k).item() == pytest.approx(expected)


def test_condition_number_of_a_tensor_and_of_a_record() -> None:
    x = noise(30, 6)
    expected = np.linalg.cond((x - x.mean(dim=0)).numpy())
    assert condition_number(singular_values(x)).item() == pytest.approx(expected)
    assert condition_number(spectrum_of(x)).item() == pytest.approx(expected)
    wide = noise(6, 30)
    values = np.linalg.svd((wide - wide.mean(dim=0)).numpy(), compute_uv=False)
    assert condition_number(spectrum_of(wide)).item() == pytest.approx(values[0] / values[4])
    moments = Moments(30)
    moments.update(wide)
    assert condition_number(moments.spectrum()).item() == pytest.approx(values[0] / values[4])
    assert condition_number(singular_values(wide)) > 1e7  # of a tensor all values count, also what centering took


def test_condition_number_of_singular_spectra() -> None:
    assert condition_number(torch.tensor([2.0, 1.0, 0.0])) == math.inf
    assert condition_number(torch.zeros(3)) == 0
    one_row = Spectrum(torch.zeros(1), torch.tensor(1.0), 4)
    assert condition_number(one_row) == 0


def test_bad_rows_do_not_count_for_the_condition_number() -> None:
    wide = noise(8, 30)
    spoiled = torch.cat([wide, torch.full((5, 30), torch.nan, dtype=torch.float64)])
    assert condition_number(spectrum_of(spoiled)).item() == pytest.approx(condition_number(spectrum_of(wide)).item())


def test_isotropy_knows_the_space() -> None:
    wide = noise(6, 30)
    from_record = isotropy(spectrum_of(wide)).item()
    values = np.linalg.svd((wide - wide.mean(dim=0)).numpy(), compute_uv=False) ** 2
    assert from_record == pytest.approx((values.sum() ** 2 / (values**2).sum() - 1) / 29)
    assert isotropy(singular_values(wide)).item() > 5 * from_record
    assert isotropy(torch.tensor([3.0])) == 0  # one dimension
    assert isotropy(torch.ones(7)).item() == pytest.approx(1)


def test_the_range_of_the_fit_is_what_is_fitted() -> None:
    # two power laws with a knee after rank 20
    spectrum = torch.where(RANKS <= 20, RANKS**-1.0, 20.0 * RANKS**-2.0).sqrt()
    assert alpha_req(spectrum, 1, 20).item() == pytest.approx(1)
    assert alpha_req(spectrum, 20, 100).item() == pytest.approx(2)
    assert 1 < alpha_req(spectrum).item() < 2
    assert alpha_req_fit(spectrum, 1, 20).item() == pytest.approx(1)
    assert alpha_req_fit(spectrum).item() < 0.99
    assert torch.equal(alpha_req(spectrum), alpha_req(spectrum, 4, 100))
    assert torch.equal(alpha_req(spectrum, 4, 100), alpha_req(spectrum[:100], 4, 500))


def test_weights_of_the_fit() -> None:
    # three ranks by hand: slope of log lambda on -log rank with weights 1 / rank
    spectrum = torch.tensor([1.0, 0.6, 0.5], dtype=torch.float64)
    x, y, w = -np.log([1, 2, 3]), 2 * np.log([1.0, 0.6, 0.5]), np.array([1, 1 / 2, 1 / 3])
    x, y = x - np.average(x, weights=w), y - np.average(y, weights=w)
    slope = np.sum(w * x * y) / np.sum(w * x * x)
    assert alpha_req(spectrum, 1, 3).item() == pytest.approx(slope)
    fit = 1 - np.sum(w * (y - slope * x) ** 2) / np.sum(w * y * y)
    assert alpha_req_fit(spectrum, 1, 3).item() == pytest.approx(fit)


def test_the_fit_ends_before_rounding_noise() -> None:
    noisy = RANKS**-0.5
    noisy[60:] = 1e-5 * noise(60, 1).squeeze().abs().sort(descending=True).values
    assert alpha_req(noisy).item() == pytest.approx(1, rel=1e-9)
    assert alpha_req(noisy).item() == pytest.approx(alpha_req(RANKS[:60] ** -0.5).item(), rel=1e-9)


@pytest.mark.parametrize(
    "spectrum", [torch.ones(5), torch.ones(2), torch.tensor([1.0] * 4 + [0.0] * 9), torch.zeros(9)]
)
def test_too_few_to_fit(spectrum: Tensor) -> None:
    assert alpha_req(spectrum).isnan()
    assert alpha_req_fit(spectrum).isnan()


def test_a_flat_spectrum_is_a_power_law() -> None:
    assert alpha_req(torch.ones(50)).item() == pytest.approx(0, abs=1e-7)
    assert alpha_req_fit(torch.ones(50)) == 1


def test_zeros_beyond_the_spectrum_do_not_move_the_fit() -> None:
    # the same rows, by their smaller side and by moments
    wide = noise(30, 100) @ torch.diag(torch.arange(1, 101, dtype=torch.float64) ** -3.0)
    moments = Moments(100)
    moments.update(wide)
    padded, short = moments.spectrum().singular_values, spectrum_of(wide).singular_values
    assert alpha_req(padded).item() == pytest.approx(alpha_req(short).item(), rel=1e-6)
    assert alpha_req_fit(padded).item() == pytest.approx(alpha_req_fit(short).item(), rel=1e-6)


@pytest.mark.parametrize(("first", "last"), [(0, 10), (5, 6), (7, 3), (-1, 5)])
def test_bad_ranges(first: int, last: int) -> None:
    for fn in (alpha_req, alpha_req_fit):
        with pytest.raises(
            ValueError, match=f"`first` and `last` must span three ranks or more.* got {first} and {last}"
        ):
            fn(torch.ones(20), first, last)


def test_few_rows_bias_the_exponent_low() -> None:
    std = torch.arange(1, 257) ** -0.5  # a true exponent of 1
    spectra = [
        singular_values(torch.randn(100, 256, generator=torch.Generator().manual_seed(s)) * std) for s in range(6)
    ]
    assert np.mean([alpha_req(spectrum, 4, 50).item() for spectrum in spectra]) == pytest.approx(0.935, abs=0.03)
