"""What ``full_precision`` does to arguments, autocast and gradients."""

import pytest
import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def product(x: Tensor, scale: float = 1.0, weight: Tensor | None = None) -> Tensor:
    return scale * (x @ (x.T if weight is None else weight))


@full_precision
def ones(n: int) -> Tensor:
    return torch.ones(n, n) @ torch.ones(n, n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes(dtype: torch.dtype, autocast: bool) -> None:
    x = torch.rand(3, 3).to(dtype).requires_grad_()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain, keyword = product(x), product(x=x, weight=x)
    assert plain.dtype == keyword.dtype == expected
    assert torch.equal(plain, x.to(expected) @ x.to(expected).T)
    plain.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_without_a_tensor_argument() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ones(2).dtype == torch.float32


def test_other_arguments_and_devices_pass() -> None:
    assert product(torch.ones(2, 2, dtype=torch.float16, device="meta")).dtype == torch.float32
    mask = torch.tensor([True, False])
    assert full_precision(lambda x, m: m)(torch.ones(2), mask) is mask
    assert full_precision(lambda x: x)(torch.ones(2, dtype=torch.int64)).dtype == torch.int64


def test_it_looks_like_what_it_wraps() -> None:
    assert product.__name__ == "product"
    assert product(torch.ones(1, 1), scale=3.0) == 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    torch.compiler.reset()
    compiled, compiled_ones = (torch.compile(fn, backend=backend, fullgraph=True) for fn in (product, ones))
    x = torch.rand(3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), product(x))
        assert compiled_ones(2).dtype == torch.float32
