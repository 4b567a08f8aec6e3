"""Closed forms of W-MSE, and what whitening must bear."""

import pytest
import torch
from torch import Tensor

from lightning_collapse.losses import WMSE, TooFewRowsError, wmse_loss
from lightning_collapse.losses.support.shuffle import permutation
from lightning_collapse.losses.support.whitening import inverse_cholesky
from tests.losses.cases.whitening import naive_cholesky_whitening, naive_distance, naive_wmse, well_conditioned


def covariance(shape: tuple[int, ...]) -> Tensor:
    rows = torch.randn(*shape[:-1], 2 * shape[-1], shape[-1], dtype=torch.float64)
    return rows.mT @ rows / 20


def test_whitened_rows_are_white() -> None:
    (rows,) = well_conditioned((40, 6), 1)
    white = (rows - rows.mean(dim=0)) @ inverse_cholesky(torch.cov(rows.T)).mT
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6, dtype=torch.float64))


def test_inverse_cholesky_and_its_gradient() -> None:
    matrices = covariance((3, 5))
    torch.testing.assert_close(inverse_cholesky(matrices), torch.linalg.cholesky(matrices).inverse())
    leaf = matrices.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: inverse_cholesky((m + m.mT) / 2), (leaf,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_covariances_stay_finite(dtype: torch.dtype, rank: int) -> None:
    rows = torch.randn(16, rank, dtype=dtype) @ torch.randn(rank, 8, dtype=dtype)
    for scale in (1e-3, 1.0, 500.0):
        views = [(scale * rows).requires_grad_(), (scale * torch.randn(16, 8, dtype=dtype)).requires_grad_()]
        loss = WMSE()(*views)
        loss.backward()
        assert 0 <= loss.item() <= 4
        assert all(view.grad.isfinite().all() for view in views)


def test_duplicated_rows() -> None:
    rows = torch.randn(3, 8).repeat(6, 1).requires_grad_()
    loss = WMSE()(rows, torch.randn(18, 8))
    loss.backward()
    assert loss.isfinite()
    assert rows.grad.isfinite().all()


def test_features_that_are_not_finite_raise_nothing() -> None:
    rows = torch.randn(16, 4)
    rows[3, 2] = torch.nan
    assert WMSE()(rows, rows).isnan()


def test_triangular_maps_are_undone() -> None:
    """And normalized distances stay between 0 and 4."""
    first, second = well_conditioned((40, 6), 2)
    upper = torch.randn(6, 6, dtype=torch.float64).triu() + 3 * torch.eye(6, dtype=torch.float64)
    assert wmse_loss(first, first @ upper).item() == pytest.approx(0, abs=1e-12)
    assert wmse_loss(first, -first).item() == pytest.approx(4)
    assert wmse_loss(first @ upper, second).item() == pytest.approx(wmse_loss(first, second).item())


def test_sub_batches_are_whitened_one_by_one() -> None:
    first, second = well_conditioned((50, 4), 2)
    step = torch.tensor(7)
    expected = 0.0
    for stream in range(3):
        order = permutation(50, step, stream, first.device).numpy()
        for part in (order[:17], order[17:34], order[34:]):  # two rows too many for 3 x 16 enlarge two of them
            white = [naive_cholesky_whitening(z.numpy()[part], eps=0.1) for z in (first, second)]
            expected += len(part) * naive_distance(*white) / 50 / 3
    found = wmse_loss(first, second, sub_batch=16, iterations=3, eps=0.1, step=step)
    assert found.item() == pytest.approx(expected)


def test_one_process_has_one_scope() -> None:
    first, second = well_conditioned((40, 6), 2)
    for scope in ("rank", "global"):
        assert WMSE(scope=scope)(first, second).item() == pytest.approx(naive_wmse(first.numpy(), second.numpy()))


def test_without_normalization() -> None:
    first, second = well_conditioned((40, 6), 2)
    white = [naive_cholesky_whitening(z.numpy()) for z in (first, second)]
    loss = WMSE(normalize=False)
    assert loss(first, second).item() == pytest.approx(((white[0] - white[1]) ** 2).mean())
    constant = torch.ones(8, 4)
    assert loss(constant, constant).item() == loss.value_at_collapse == 0


def test_too_few_rows_for_the_features() -> None:
    for scope in ("rank", "global"):
        with pytest.raises(TooFewRowsError, match=r"at least 7 rows over all processes, got 6 \(6 here\)"):
            WMSE(scope=scope)(*torch.randn(2, 6, 6))
    with pytest.raises(ValueError, match=r"`sub_batch` must be above the number of features, got 128 for 128 feat"):
        WMSE()(*torch.randn(2, 200, 128))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`scope` must be one of \('rank', 'global'\), got 'node'"):
        WMSE(scope="node")
    with pytest.raises(ValueError, match="`eps` must be at least 0 and below 1, got 1"):
        WMSE(eps=1)
    for argument in ("sub_batch", "iterations"):
        with pytest.raises(ValueError, match=f"`{argument}` must be an integer of at least 1, got 0"):
            WMSE(**{argument: 0})
    expected = "WMSE(sub_batch=128, iterations=1, eps=0.0, normalize=True, scope='rank')"
    assert repr(WMSE()) == expected
