"""Singular values by the smaller Gram matrix against an SVD in double precision."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.spectral import singular_values, spectrum_of
from lightning_collapse.spectral.eigenvalues import eigenvalues
from lightning_collapse.spectral.spectrum import RESOLUTION, Spectrum, finish_spectrum, gram_of, values_of


def svd(x: Tensor, center: bool = True) -> np.ndarray:
    rows = x.double().numpy()
    return np.linalg.svd(rows - rows.mean(axis=0) if center else rows, compute_uv=False)


def with_spectrum(n: int, d: int, values: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(n, len(values), generator=generator, dtype=torch.float64)
    right = torch.randn(d, len(values), generator=generator, dtype=torch.float64)
    left, right = (torch.linalg.qr(m - m.mean(dim=0) * (m is left))[0] for m in (left, right))
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def noise(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


HARD = {
    "white-tall": noise(60, 20),
    "white-wide": noise(20, 60),
    "square": noise(30, 30),
    "tail-1e-6-tall": with_spectrum(60, 20, [1.0] * 4 + [1e-6] * 16),
    "tail-1e-6-wide": with_spectrum(21, 50, [1.0] * 4 + [1e-6] * 16),
    "power-2": noise(80, 40) * torch.arange(1, 41) ** -2.0,
    "far": 1000 + noise(50, 20),
    "far-wide": 1000 + noise(20, 50),
    "one-feature": noise(30, 1),
}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("data", HARD)
def test_singular_values(data: str, center: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        x = HARD[data].to(dtype)
        found = singular_values(x, center)
        expected = svd(x, center)
        assert found.dtype == dtype
        assert found.shape == (min(x.shape),)
        assert (found.diff() <= 0).all()
        # 1e-6 of the largest is 1e-12 of the Gram matrix, four digits above the rounding of its eigenvalues
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=3e-8 * expected[0])
        leading = expected > 1e-3 * expected[0]
        assert found[leading].tolist() == pytest.approx(expected[leading].tolist(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e150, 1e-150])
def test_double_precision_at_any_scale(scale: float) -> None:
    for center in (True, False):
        for x in (HARD["white-tall"], HARD["white-wide"], HARD["far"]):
            found, expected = singular_values(scale * x, center), singular_values(x, center)
            torch.testing.assert_close(found / scale, expected, rtol=1e-9, atol=1e-7 * expected[0].item())


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_single_precision_at_any_scale(scale: float) -> None:
    x = HARD["white-tall"].float()
    torch.testing.assert_close(singular_values(scale * x) / scale, singular_values(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("data", ["white-tall", "white-wide"])
def test_kurtosis_at_any_scale(data: str, scale: float) -> None:
    x = HARD[data]
    energy = (x - x.mean(dim=0)).square().sum(dim=1)
    expected = ((energy**2).sum() / energy.sum() ** 2).item()
    assert spectrum_of(x).kurtosis.item() == pytest.approx(expected, rel=1e-10)
    assert spectrum_of(x * scale).kurtosis.item() == pytest.approx(expected, rel=1e-10)


def test_the_record() -> None:
    x = HARD["white-tall"]
    record = spectrum_of(x.float())
    assert record.singular_values.dtype == record.count.dtype == torch.float64
    assert record.count == 60
    assert record.dim == 20
    assert not record.sketched
    assert spectrum_of(x, center=False).kurtosis is None
    with pytest.raises(AttributeError):
        record.dim = 3


def test_masks_and_bad_rows_are_left_out() -> None:
    for x in (HARD["white-tall"], HARD["white-wide"]):
        spoiled, mask = x.clone(), torch.arange(len(x)) % 4 != 2
        spoiled[5, 3], spoiled[9] = torch.nan, torch.inf
        keep = mask & spoiled.isfinite().all(dim=1)
        for center in (True, False):
            found, expected = spectrum_of(spoiled, center, mask), spectrum_of(x[keep], center)
            size = len(expected.singular_values)
            torch.testing.assert_close(
                found.singular_values[:size],
                expected.singular_values,
                rtol=1e-9,
                atol=1e-7 * expected.singular_values[0],
            )
            assert (found.singular_values[size:] <= 1e-7 * found.singular_values[0]).all()
            assert found.count == keep.sum()
        assert spectrum_of(spoiled, mask=mask).kurtosis.item() == pytest.approx(spectrum_of(x[keep]).kurtosis.item())
        plain = singular_values(spoiled)[: min(len(x) - 2, x.shape[1]) - 1]
        clean = singular_values(x[spoiled.isfinite().all(dim=1)])[: len(plain)]
        torch.testing.assert_close(plain, clean, rtol=1e-9, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1000.0])
def test_constant_rows_have_no_spectrum(value: float) -> None:
    for n, d in ((77, 5), (5, 77), (1, 4), (1, 1), (9, 1)):
        for dtype in (torch.float32, torch.float64):
            x = torch.full((n, d), value, dtype=dtype)
            assert torch.equal(singular_values(x), torch.zeros(min(n, d), dtype=dtype))
            uncentered = singular_values(x, center=False)
            assert uncentered[0].item() == pytest.approx(abs(value) * (n * d) ** 0.5, rel=1e-6)
            assert (uncentered[1:] <= 1e-7 * uncentered[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_differ_by_rounding_have_no_spectrum(dtype: torch.dtype) -> None:
    x = torch.full((60, 8), 1000.0, dtype=dtype)
    x = torch.nextafter(x, x + torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert x.std(dim=0).min() > 0
    assert not singular_values(x).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_spread_above_the_resolution_is_kept(dtype: torch.dtype) -> None:
    x = (1 + 4 * RESOLUTION * HARD["white-tall"]).to(dtype)
    assert singular_values(x).tolist() == pytest.approx(svd(x).tolist(), rel=1e-5)


@pytest.mark.parametrize("offset", [64.0, 256.0, 1024.0])
def test_half_features_far_from_the_origin_keep_what_the_format_left(offset: float) -> None:
    # the last bit of bfloat16 is 8 at 1024, and still tells a spread of 1 from none
    x = (noise(200, 16) + offset).bfloat16()
    found = singular_values(x)
    assert found.tolist() == pytest.approx(svd(x).tolist(), rel=1e-6)
    assert not singular_values(torch.full((200, 16), offset, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (1, 1), (2, 1)])
def test_few_rows(shape: tuple[int, int]) -> None:
    x = noise(*shape)
    assert singular_values(x).shape == (min(shape),)
    assert singular_values(x, center=False).tolist() == pytest.approx(svd(x, center=False).tolist(), rel=1e-7)
    if shape[0] == 1:
        assert not singular_values(x).any()


def test_nothing_but_bad_rows() -> None:
    record = spectrum_of(torch.full((5, 3), torch.nan))
    assert not record.singular_values.any()
    assert record.count == 0
    assert record.kurtosis == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_features(dtype: torch.dtype, autocast: bool) -> None:
    for x in (HARD["white-tall"].to(dtype), HARD["white-wide"].to(dtype)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = singular_values(x)
        assert found.dtype == torch.float32
        keep = min(len(x) - 1, x.shape[1])
        assert found[:keep].tolist() == pytest.approx(svd(x)[:keep].tolist(), rel=1e-6)


def test_gradient_is_that_of_an_svd() -> None:
    for x in (HARD["white-tall"][:12, :5], HARD["white-wide"][:5, :12]):
        weights = torch.arange(1.0, 5.0, dtype=torch.float64)
        leaf, other = (x.clone().requires_grad_() for _ in range(2))
        (singular_values(leaf)[:4] * weights).sum().backward()
        (torch.linalg.svdvals(other - other.mean(dim=0))[:4] * weights).sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-8, atol=1e-8)


def test_gradient_with_equal_singular_values_is_finite() -> None:
    x = torch.eye(4, dtype=torch.float64).requires_grad_()
    singular_values(x, center=False).sum().backward()
    torch.testing.assert_close(x.grad, torch.eye(4, dtype=torch.float64))


def test_gram_of_takes_the_smaller_side() -> None:
    for name, size in (("white-tall", 20), ("white-wide", 20), ("square", 30)):
        gram, record = gram_of(HARD[name])
        assert gram.shape == (size, size)
        found = finish_spectrum(eigenvalues(gram), record)
        torch.testing.assert_close(found.singular_values, spectrum_of(HARD[name]).singular_values)


def test_finish_spectrum_keeps_what_the_record_knows() -> None:
    record = Spectrum(torch.tensor(2.0), torch.tensor(5.0), 7, torch.tensor(3.0))
    found = finish_spectrum(torch.tensor([9.0, 4.0, 0.0]), record)
    assert found.singular_values.tolist() == [6.0, 4.0, 0.0]
    assert (found.count, found.dim, found.kurtosis) == (5.0, 7, 3.0)


def test_values_of() -> None:
    values = torch.tensor([2.0, 1.0], dtype=torch.bfloat16)
    assert values_of(values).dtype == torch.float32
    assert values_of(values.double()).dtype == torch.float64
    assert torch.equal(values_of(Spectrum(values.float(), torch.tensor(3.0), 2)), values.float())


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    for fn in (singular_values, spectrum_of):
        with pytest.raises(
            ValueError, match=r"`features` must have shape \(N, D\), got .* Flatten tokens or pool maps"
        ):
            fn(torch.zeros(shape))
