"""Extremes carry what is not finite, whatever type and layout, and the bounds of an overflow are closed forms."""

from math import inf, isinf, isnan, log, nan

import pytest
import torch

from lightning_collapse.functional import Cause, absolute_maximum, extremes, producer_cause
from lightning_collapse.functional.non_finite import bits_of_headroom

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def numbers(dtype):
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e5m2, torch.float8_e4m3fn])
@pytest.mark.parametrize("view", ["plain", "permuted", "sliced", "expanded", "scalar"])
def test_extremes_are_those_of_all_numbers(dtype, view):
    x = numbers(dtype)
    x = {
        "plain": x,
        "permuted": x.permute(2, 0, 1),
        "sliced": x[:, 1:3, ::2],
        "expanded": x[:1].expand(7, 4, 5),
        "scalar": x[0, 0, 0],
    }[view]
    least, largest = extremes(x)
    reference = x.double().flatten()
    assert (float(least), float(largest)) == (float(reference.min()), float(reference.max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_one_number_that_is_not_finite_is_never_missed(dtype, bad):
    for place in range(60):
        x = numbers(dtype)
        x.view(-1)[place] = bad
        size = absolute_maximum(*map(float, extremes(x.permute(2, 1, 0))))
        assert isnan(size) if isnan(bad) else isinf(size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_overflow_are_no_alarm(dtype):
    x = torch.full((4096,), torch.finfo(dtype).max, dtype=dtype)
    assert absolute_maximum(*map(float, extremes(x))) == torch.finfo(dtype).max


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"operand": 32752.0}, Cause.OVERFLOW),
        ({"operand": 10.0}, Cause.UNDEFINED),
        ({"operand": 10.0, "weight": 103.0, "terms": 64}, Cause.OVERFLOW),  # 64 * 10 * 103 = 65,920
        ({"operand": 10.0, "weight": 102.0, "terms": 64}, Cause.UNDEFINED),  # 65,280
        ({"operand": log(65504.0)}, Cause.OVERFLOW),
        ({"operand": 1.0, "before": 4094.0}, Cause.OVERFLOW),
        ({"operand": 1.0, "before": 4093.0}, Cause.UNDEFINED),
        ({"operand": 32752.0, "made": nan}, Cause.UNDEFINED),
    ],
)
def test_an_infinity_is_an_overflow_where_operands_can_reach_the_maximum(given, cause):
    assert producer_cause(**{"made": inf, "weight": 0.0, "terms": 1, "limit": 65504.0, **given}) == cause


def test_headroom_is_a_logarithm():
    assert bits_of_headroom(1.0, 2.0**16) == 16
    assert isnan(bits_of_headroom(nan, 2.0))
    assert isnan(bits_of_headroom(inf, 2.0))
    assert bits_of_headroom(5e-324, 1.7e308) > 2000


@pytest.mark.parametrize("cause", list(Cause))
def test_every_cause_has_words(cause):
    assert cause.words
    assert cause.words == cause.words.lower()
