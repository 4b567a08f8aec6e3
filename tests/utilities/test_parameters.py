"""Which parameters hold numbers."""

import pytest
import torch
from torch import nn

from lightning_collapse.utilities.parameters import as_real, real_parameters, why_no_number

REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
CODES = [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", REAL + CODES, ids=str)
def test_by_dtype(dtype):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    net[1].weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    kept, left_out = real_parameters(net)
    assert list(kept) == ["0.weight", "0.bias"] + ["1.weight"] * (dtype in REAL)
    assert left_out == ({} if dtype in REAL else {"1.weight": str(dtype)})


def test_lazy_and_sparse():
    net = nn.Sequential(nn.LazyLinear(2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = nn.Parameter(torch.eye(2).to_sparse())
    assert real_parameters(net) == ({}, {"0.weight": "lazy", "1.weight": "torch.sparse_coo"})


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_what_is_kept_can_be_reckoned_with(dtype):
    tensor = torch.ones(3).to(dtype) * (3 + 4j if dtype.is_complex else 5)
    real = as_real(tensor.conj())
    assert not why_no_number(tensor)
    assert not real.is_complex()
    [norm] = torch._foreach_norm([real], 2, dtype=torch.float64)
    assert norm.item() == pytest.approx(75**0.5)


def test_real_and_imaginary_parts_share_memory():
    tensor = torch.zeros(2, dtype=torch.cfloat)
    as_real(tensor)[0, 1] = 2
    assert tensor[0] == 2j
