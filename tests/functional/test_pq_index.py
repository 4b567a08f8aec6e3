"""Closed forms of the PQ Index."""

import math

import pytest
import torch

from lightning_collapse.functional import pq_index

HOT = torch.nn.functional.one_hot(torch.tensor(7), 100).double()


@pytest.mark.parametrize(
    ("values", "p", "q", "expected"),
    [
        (torch.full((3, 4, 5), -2.5), 1.0, 2.0, 0.0),
        (HOT, 1.0, 2.0, 0.9),
        (-HOT, 0.5, 1.0, 0.99),
        (torch.zeros(8), 1.0, 2.0, 0.0),
        (torch.tensor([3.0, -4.0]), 1.0, 2.0, 1 - 7 / 5 / math.sqrt(2)),
    ],
)
def test_closed_forms(values: torch.Tensor, p: float, q: float, expected: float) -> None:
    for scale in (1.0, 1e-30, 1e30):
        assert pq_index(scale * values, p, q).item() == pytest.approx(expected, abs=1e-6)


def test_gaussian_numbers() -> None:
    values = torch.randn(1000, 1000)
    assert pq_index(values, 1.0, 2.0).item() == pytest.approx(1 - math.sqrt(2 / math.pi), abs=2e-3)
    assert pq_index(values).item() == pytest.approx(0.1528, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_read_in_single_precision(dtype: torch.dtype) -> None:
    values = torch.randn(300, 300).to(dtype)
    assert pq_index(values).dtype == torch.float32
    assert pq_index(values).item() == pytest.approx(pq_index(values.double()).item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_read_nan(bad: float) -> None:
    assert pq_index(torch.tensor([1.0, bad, 2.0])).isnan()
    assert pq_index(torch.empty(0)).isnan()


@pytest.mark.parametrize(("p", "q"), [(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (math.nan, 1.0)])
def test_exponents(p: float, q: float) -> None:
    with pytest.raises(ValueError, match="0 < p < q"):
        pq_index(torch.ones(3), p, q)
