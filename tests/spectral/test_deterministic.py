"""Deterministic forms are those of torch, numbers and gradients."""

import pytest
import torch

from lightning_collapse.spectral.deterministic import nan_median, running_sum


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_median_is_that_of_torch(dim):
    values = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    values[values.abs() < 0.4] = torch.nan
    values[2], values[:, 3] = torch.nan, torch.inf
    torch.testing.assert_close(nan_median(values, dim), values.nanmedian(dim).values, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 100])
@pytest.mark.parametrize("dim", [0, -1])
def test_running_sums_are_those_of_torch(size, dim, deterministic):
    values = torch.rand((size, 3) if dim == 0 else (3, size), dtype=torch.float64).requires_grad_()
    found, wanted = running_sum(values, dim), values.cumsum(dim)
    torch.testing.assert_close(found, wanted)
    weight = torch.rand_like(values)
    gradients = [torch.autograd.grad((sums * weight).sum(), values)[0] for sums in (found, wanted)]
    torch.testing.assert_close(*gradients)
