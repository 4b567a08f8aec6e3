"""Singular values of many matrices at once."""

import math

import numpy as np
import pytest
import torch

from lightning_collapse.spectral import matrices
from lightning_collapse.spectral.matrices import alike, matrix_spectra


@pytest.mark.parametrize("elements", [matrices.BATCH_ELEMENTS, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_are_those_of_an_svd(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "BATCH_ELEMENTS", elements)
    several = [torch.randn(12, 7).to(dtype), torch.randn(7, 12).to(dtype), torch.randn(12, 7).to(dtype).T]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = matrix_spectra(several)
    assert found.dtype == torch.float64
    for values, matrix in zip(found, several, strict=True):
        expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)


def test_one_bad_matrix_leaves_the_others() -> None:
    several = [torch.randn(5, 6) for _ in range(3)]
    expected = matrix_spectra(several)
    several[1] = several[1].clone()
    several[1][2, 3] = math.inf
    found = matrix_spectra(several)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_small_values_are_right_down_to_the_square_root_of_the_rounding() -> None:
    left, right = (torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q for _ in range(2))
    values = torch.logspace(0, -6, 8, dtype=torch.float64)
    [found] = matrix_spectra([(left * values) @ right.T])
    torch.testing.assert_close(found[:8], values, rtol=1e-3, atol=0)


def test_matrices_of_one_size_go_together_whichever_way_they_lie() -> None:
    several = [torch.zeros(shape) for shape in ((3, 4), (4, 3), (3, 3), (4, 3))]
    assert alike(several) == [[0, 1, 3], [2]]
