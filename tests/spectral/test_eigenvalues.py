"""Eigenvalues that never raise."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_collapse.spectral import eigenvalues, eigenvectors
from lightning_collapse.spectral.eigenvalues import safe_sqrt

SOLVE = torch.linalg.eigvalsh


def grams(count: int, size: int = 5) -> Tensor:
    x = torch.randn(count, 8, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.transpose(1, 2) @ x


def solver_that_fails(when: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    def solve(matrix: Tensor) -> Tensor:
        if when(matrix):
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return SOLVE(matrix)

    return solve


def test_descending_and_not_negative() -> None:
    gram = grams(1)[0]
    values = eigenvalues(gram)
    torch.testing.assert_close(values, SOLVE(gram).flip(0))
    assert values[0] > values[-1]
    singular = torch.ones(6, 6, dtype=torch.float32) / 3  # rounding makes some of its eigenvalues negative
    assert (SOLVE(singular) < 0).any()
    assert (eigenvalues(singular) >= 0).all()
    assert eigenvalues(singular).dtype == torch.float32


def test_batches() -> None:
    batch = grams(6).view(2, 3, 5, 5)
    values = eigenvalues(batch)
    assert values.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(values[i, j], eigenvalues(batch[i, j]))


def test_empty() -> None:
    assert eigenvalues(torch.zeros(0, 0)).shape == (0,)
    assert eigenvalues(torch.zeros(0, 3, 3)).shape == (0, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_matrix_in_a_batch(bad: float) -> None:
    batch = grams(3)
    expected = eigenvalues(batch)
    batch[1, 2, 3] = batch[1, 3, 2] = bad
    values = eigenvalues(batch)
    assert values[1].isnan().all()
    assert torch.equal(values[[0, 2]], expected[[0, 2]])
    assert eigenvalues(batch[1]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_try_when_the_batch_fails(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    batch = grams(4).view(2, 2, 5, 5).to(dtype)
    expected = eigenvalues(batch)
    monkeypatch.setattr(torch.linalg, "eigvalsh", solver_that_fails(lambda matrix: matrix.ndim > 2))
    values = eigenvalues(batch)
    assert values.dtype == dtype
    assert values.shape == (2, 2, 5)
    torch.testing.assert_close(values, expected, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0)


def test_second_try_of_a_single_matrix_is_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = grams(1)[0]
    monkeypatch.setattr(torch.linalg, "eigvalsh", solver_that_fails(lambda matrix: matrix.dtype == torch.float32))
    values = eigenvalues(gram.float())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, SOLVE(gram.float().double()).flip(0).float())


def test_a_matrix_that_no_solver_converges_on_reads_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = grams(3)
    batch[1] *= 7
    stubborn = batch[1].trace()
    expected = eigenvalues(batch)

    def never(matrix: Tensor) -> bool:
        return matrix.ndim > 2 or bool((matrix.trace() - stubborn).abs() < 1e-6 * stubborn)

    monkeypatch.setattr(torch.linalg, "eigvalsh", solver_that_fails(never))
    values = eigenvalues(batch)
    assert values[1].isnan().all()
    torch.testing.assert_close(values[[0, 2]], expected[[0, 2]])
    assert eigenvalues(batch[1]).isnan().all()


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="must be batches of square matrices"):
        eigenvalues(torch.zeros(2, 3))


def test_gradient_of_repeated_eigenvalues_is_finite() -> None:
    gram = torch.eye(3, dtype=torch.float64, requires_grad=True)
    eigenvalues(gram).sum().backward()
    torch.testing.assert_close(gram.grad, torch.eye(3, dtype=torch.float64))


def test_safe_sqrt() -> None:
    values = torch.tensor([4.0, 0.0, -1.0, torch.nan], requires_grad=True)
    root = safe_sqrt(values)
    assert root[:3].tolist() == [2.0, 0.0, 0.0]
    assert root[3].isnan()
    root[:3].sum().backward()
    assert values.grad.tolist() == [0.25, 0.0, 0.0, 0.0]


def test_eigenvectors_are_descending_and_diagonalize() -> None:
    x = torch.randn(7, 3, dtype=torch.float64)
    gram = x @ x.T
    values, vectors = eigenvectors(gram)
    torch.testing.assert_close(values, eigenvalues(gram))
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, gram)
    assert (values.diff() <= 0).all()


def test_eigenvectors_of_bad_numbers_are_nan_and_no_error() -> None:
    for bad in (torch.nan, torch.inf):
        values, vectors = eigenvectors(torch.full((3, 3), bad))
        assert values.isnan().all()
        assert vectors.isfinite().all()


@pytest.mark.parametrize("failures", [1, 2])
def test_eigenvectors_where_the_solver_fails(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, calls = torch.linalg.eigh, []

    def failing(matrix: torch.Tensor) -> object:
        calls.append(matrix)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigenvectors(torch.diag(torch.tensor([1.0, 3.0])))
    assert values.dtype == vectors.dtype == torch.float32
    if failures == 1:
        torch.testing.assert_close(values, torch.tensor([3.0, 1.0]))
    else:
        assert values.isnan().all()
