"""The histogram equals numpy's."""

import numpy as np
import pytest
import torch

from lightning_collapse.reporting import LOG10_EDGES, log10_histogram
from tests.cuda.waits import no_wait

EDGES = np.array(LOG10_EDGES)


def reference(singular_values, n):
    with np.errstate(divide="ignore"):
        logs = np.log10(singular_values / np.sqrt(n - 1))
    return np.histogram(logs.clip(EDGES[0], EDGES[-1]), EDGES)[0]


@pytest.mark.parametrize("decades", [1, 5, 12])
def test_equals_numpy(decades):
    values = 10 ** np.random.default_rng(decades).normal(-2, decades, 2000)
    counts = log10_histogram(torch.from_numpy(values), n=77)
    assert counts.dtype == torch.float64
    np.testing.assert_array_equal(counts, reference(values, 77))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_on_an_edge_belongs_to_the_bin_above(dtype):
    exponents = np.arange(-8, 4)
    counts = log10_histogram(torch.from_numpy(10.0**exponents).to(dtype), n=2)
    assert EDGES[:-1][counts.bool().numpy()].tolist() == exponents.tolist()


def test_ends_take_what_lies_outside_and_nan_is_not_counted():
    values = torch.tensor([0.0, 1e-30, 1e30, float("inf"), float("nan")])
    counts = log10_histogram(values, n=10)
    assert counts[0] == 2
    assert counts[-1] == 2
    assert counts.sum() == 4


@pytest.mark.parametrize("n", [0, 1, torch.tensor(1)])
def test_without_two_rows_there_are_only_zeros(n):
    assert log10_histogram(torch.zeros(5), n)[0] == 5


def test_layers_of_one_width_are_counted_at_once():
    values, n = torch.rand(3, 20, dtype=torch.float64), torch.tensor([10, 1000, 10**7])
    counts = log10_histogram(values, n)
    assert counts.shape == (3, len(LOG10_EDGES) - 1)
    for row, layer, rows in zip(counts, values, n, strict=True):
        torch.testing.assert_close(row, log10_histogram(layer, int(rows)))
        torch.testing.assert_close(row, log10_histogram(layer, rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_in_float32_out_with_and_without_autocast(dtype):
    values = torch.rand(64).to(dtype)
    counts = log10_histogram(values, n=9)
    assert counts.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(log10_histogram(values, n=9), counts, rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_does_not_synchronize():
    values, n = torch.rand(64, device="cuda"), torch.tensor(9, device="cuda")
    with no_wait():
        log10_histogram(values, n)
        log10_histogram(values, 9)
