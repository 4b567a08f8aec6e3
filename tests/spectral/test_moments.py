"""Streaming moments against sums over all rows at once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.spectral import Moments, reduce_moments, spectrum_of
from lightning_collapse.spectral.moments import STATES

N, D = 50, 6


def rows(offset: float = 0.0, n: int = N, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    skewed = torch.rand(n, D, generator=generator, dtype=torch.float64).log()  # third moments that are not zero
    return skewed * torch.arange(1.0, D + 1, dtype=torch.float64) + offset


def naive(x: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """The seven sums, by loops."""
    y = (x - shift).numpy()
    energy = [float(np.dot(row, row)) for row in y]
    states = {
        "seen": len(y),
        "count": len(y),
        "shift": shift.numpy(),
        "total": sum(y, np.zeros(D)),
        "second": sum((np.outer(row, row) for row in y), np.zeros((D, D))),
        "cubic": sum((e * row for e, row in zip(energy, y, strict=True)), np.zeros(D)),
        "quartic": sum(e * e for e in energy),
    }
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in states.items()}


def fed(*batches: Tensor, dtype: torch.dtype | None = None) -> Moments:
    moments = Moments(D, dtype=dtype)
    for batch in batches:
        moments.update(batch)
    return moments


def check(found: Moments, expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    assert set(found.states()) == set(STATES) == set(expected)
    for name, state in found.states().items():
        # a sum about the mean is zero up to the rounding of its terms
        scale = (expected["quartic"].item() + N) if name == "total" else expected[name].abs().max().item()
        torch.testing.assert_close(state.double(), expected[name], rtol=rtol, atol=rtol * scale, msg=name)


def test_one_batch_about_its_mean() -> None:
    x = rows(3.0)
    moments = fed(x)
    torch.testing.assert_close(moments.shift, x.mean(dim=0), rtol=1e-14, atol=0)
    expected = naive(x, moments.shift)
    expected["total"] = torch.zeros(D, dtype=torch.float64)
    for name, state in moments.states().items():
        torch.testing.assert_close(state, expected[name], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("split", [[50], [1, 49], [7, 0, 30, 13], [1] * 50])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_any_split_is_the_naive_sum(split: list[int], offset: float) -> None:
    x = rows(offset)
    moments = fed(*x.split(split))
    check(moments.about(x.mean(dim=0)), naive(x, x.mean(dim=0)) | {"total": moments.about(x.mean(dim=0)).total}, 1e-9)
    check(moments, naive(x, moments.shift), 1e-9)
    torch.testing.assert_close(moments.mean, x.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.scatter, (N - 1) * torch.cov(x.T), rtol=1e-9, atol=1e-9)


def test_about_moves_all_seven_states() -> None:
    x = rows()
    anchor = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0], dtype=torch.float64)
    moved = fed(x[:20], x[20:]).about(anchor)
    check(moved, naive(x, anchor), 1e-12)
    check(moved.about(torch.zeros(D, dtype=torch.float64)), naive(x, torch.zeros(D, dtype=torch.float64)), 1e-12)


def test_about_leaves_the_original_alone() -> None:
    moments = fed(rows())
    before = {name: state.clone() for name, state in moments.states().items()}
    moments.about(torch.ones(D, dtype=torch.float64))
    moments.merge(fed(rows(2.0)))
    assert all(torch.equal(before[name], state) for name, state in moments.states().items())


@pytest.mark.parametrize("offset", [0.0, 2.0, 1e5])
def test_merge_of_streams_with_different_anchors(offset: float) -> None:
    first, second = rows(offset, 20), rows(offset + 5, 30, seed=1)
    merged = fed(first).merge(fed(second[:10], second[10:]))
    both = torch.cat([first, second])
    assert torch.equal(merged.shift, fed(first).shift)
    check(merged, naive(both, merged.shift), 1e-9)
    other = fed(second).merge(fed(first))
    torch.testing.assert_close(other.scatter, merged.scatter, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(other.about(merged.shift).quartic, merged.quartic, rtol=1e-9, atol=0)


def test_merge_with_nothing() -> None:
    moments, x = fed(rows(7.0)), rows(7.0)
    check(moments.merge(Moments(D)), naive(x, moments.shift), 1e-12)
    check(Moments(D).merge(moments), naive(x, moments.shift), 1e-12)
    empty = Moments(D).merge(Moments(D))
    assert all(not state.any() for state in empty.states().values())


def test_reduce_without_other_processes_is_about_the_mean() -> None:
    x = rows(10.0)
    reduced = fed(x[:5], x[5:]).reduce()
    expected = naive(x, x.mean(dim=0))
    check(reduced, expected | {"total": reduced.total}, 1e-11)
    assert reduced.total.abs().max() < 1e-11
    narrow = Moments(2)
    narrow.update(x[:, :2])
    pair = reduce_moments([narrow, fed(x)])
    assert [len(moments.shift) for moments in pair] == [2, D]
    torch.testing.assert_close(pair[0].second, expected["second"][:2, :2], rtol=1e-11, atol=0)


def test_masks_and_bad_rows() -> None:
    x = rows(4.0)
    spoiled = x.clone()
    spoiled[3, 1], spoiled[20, 0], spoiled[40] = torch.nan, torch.inf, -torch.inf
    mask = torch.arange(N) % 5 != 4
    keep = mask & spoiled.isfinite().all(dim=1)
    moments = Moments(D)
    for part, kept in zip(spoiled.split(11), mask.split(11), strict=True):
        moments.update(part, kept)
    assert moments.seen == mask.sum() == 40
    assert moments.count == keep.sum() == 37
    check(moments, naive(x[keep], moments.shift) | {"seen": torch.tensor(40.0, dtype=torch.float64)}, 1e-11)


def test_the_anchor_waits_for_a_row_that_counts() -> None:
    x = rows(1e5)
    moments = fed(torch.full((4, D), torch.nan), torch.zeros(0, D), x[:10], x[10:])
    torch.testing.assert_close(moments.shift, x[:10].mean(dim=0), rtol=1e-14, atol=0)
    assert moments.seen == N + 4
    check(moments, naive(x, moments.shift) | {"seen": torch.tensor(N + 4.0, dtype=torch.float64)}, 1e-9)


def test_nothing_but_bad_rows() -> None:
    moments = fed(torch.full((4, D), torch.nan), torch.full((4, D), torch.inf))
    assert moments.seen == 8
    assert all(not state.any() for name, state in moments.states().items() if name != "seen")
    assert not moments.spectrum().singular_values.any()
    assert not moments.mean.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_features_are_summed_in_double(dtype: torch.dtype, autocast: bool) -> None:
    x = rows(100.0).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        moments = fed(*x.split(7))
        spectrum = moments.spectrum()
    assert all(state.dtype == torch.float64 for state in moments.states().values())
    check(moments, naive(x.double(), moments.shift), 1e-10)
    expected = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(axis=0), compute_uv=False)
    assert spectrum.singular_values.tolist() == pytest.approx(expected.tolist(), rel=1e-7)


def test_many_bfloat16_rows_are_counted() -> None:
    ones = torch.ones(600, D, dtype=torch.bfloat16)
    assert fed(ones, ones).count == 1200  # bfloat16 stops counting at 256


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_float32_sums_about_the_anchor(offset: float) -> None:
    x = (rows() / 2 + offset).float()
    exact = fed(*x.split(10))
    moments = fed(*x.split(10), dtype=torch.float32)
    assert moments.second.dtype == torch.float32
    torch.testing.assert_close(moments.scatter.double(), exact.scatter, rtol=1e-3, atol=1e-3)
    expected = exact.spectrum().singular_values
    torch.testing.assert_close(moments.spectrum().singular_values.double(), expected, rtol=1e-3, atol=0)


def test_float32_sums_do_not_fall_back_to_half_under_autocast() -> None:
    x, anchor = rows(5.0).float(), torch.ones(D)
    off = fed(*x.split(10), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on = fed(*x.split(10), dtype=torch.float32)
        moved, merged, reduced = on.about(anchor), on.merge(on), on.reduce()
    for found, expected in ((on, off), (moved, off.about(anchor)), (merged, off.merge(off)), (reduced, off.reduce())):
        for name, state in expected.states().items():
            assert torch.equal(found.states()[name], state), name


@pytest.mark.parametrize("center", [True, False])
def test_spectrum_is_that_of_all_rows(center: bool) -> None:
    x = rows(2.0)
    record = fed(x[:9], x[9:]).spectrum(center)
    expected = spectrum_of(x, center)
    assert record.singular_values.tolist() == pytest.approx(expected.singular_values.tolist(), rel=1e-10)
    assert record.count == N
    assert record.dim == D
    assert not record.sketched
    if center:
        assert record.kurtosis.item() == pytest.approx(expected.kurtosis.item(), rel=1e-10)
    else:
        assert record.kurtosis is None
        assert expected.kurtosis is None


def test_constant_features_have_no_spectrum() -> None:
    x = torch.full((40, D), 0.1, dtype=torch.float64)
    x[:, 0] = torch.linspace(0, 1, 40)
    values = fed(*x.split(3)).spectrum().singular_values
    assert values[0] > 1
    assert not values[1:].any()


def test_overflow_reads_nan() -> None:
    values = fed(rows() * 1e200).spectrum().singular_values
    assert values.isnan().all()


def test_from_states_does_not_copy() -> None:
    moments = fed(rows())
    again = Moments.from_states(moments.states())
    assert all(getattr(again, name) is getattr(moments, name) for name in STATES)


def test_no_graph_is_kept() -> None:
    moments = fed(rows().requires_grad_())
    assert not any(state.requires_grad for state in moments.states().values())


@pytest.mark.parametrize("shape", [(3,), (3, D + 1), (2, 3, D)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"`features` must have shape \(N, {D}\), got .* Flatten tokens or pool maps"):
        Moments(D).update(torch.zeros(shape))
