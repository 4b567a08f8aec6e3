"""Ranks, importances and directions of gradient projection against the closed forms and a decomposition of rows."""

import pytest
import torch

from lightning_collapse.functional.projection import (
    accumulated_importance,
    direction_importance,
    input_directions,
    null_share,
    null_space,
    oja_directions,
    oja_step,
    scaled_weight,
    trust_region,
)

SQUARES = torch.tensor([0.719, 0.18, 0.065, 0.029, 0.007], dtype=torch.float64)


def rows(n=60, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1.5, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scales


def span(basis):
    return basis @ basis.T


@pytest.mark.parametrize(("threshold", "kept"), [(0.7, 1), (0.9, 3), (0.97, 4), (0.995, 5), (1.0, 5)])
def test_the_criterion_is_reached_and_the_released_code_stops_one_short(threshold, kept):
    assert input_directions(SQUARES.diag(), threshold=threshold).shape[1] == kept
    assert input_directions(SQUARES.diag(), threshold=threshold, released=True).shape[1] == kept - 1


def test_a_later_task_adds_what_its_own_rest_needs():
    old, new = rows(), rows(seed=1)[:, torch.arange(11, -1, -1)]
    known = input_directions(old.T @ old, threshold=0.8)
    added = input_directions(new.T @ new, known, threshold=0.95, released=True)
    rest = new - new @ known @ known.T
    _, values, vectors = torch.linalg.svd(rest, full_matrices=False)
    energy, held, k = new.square().sum(), new.square().sum() - rest.square().sum(), 0
    while held < 0.95 * energy:
        held, k = held + values[k] ** 2, k + 1
    assert added.shape[1] == k > 1
    torch.testing.assert_close(span(added), span(vectors[:k].T))
    assert (known.T @ added).abs().max() < 1e-12
    assert not input_directions(old.T @ old, known, threshold=0.8).numel()


def test_nothing_is_protected_of_nothing():
    for moment in (torch.zeros(3, 3), torch.full((3, 3), torch.nan)):
        assert input_directions(moment).shape == (3, 0)
        assert oja_directions(moment, 2).shape == (3, 0)
    assert input_directions(torch.diag(torch.tensor([1.0, 0.0, 0.0])), threshold=1.0).shape == (3, 1)
    with pytest.raises(ValueError, match="`threshold` is a share"):
        input_directions(torch.eye(2), threshold=97.0)


def test_importance_is_the_published_one_and_adds_up():
    found = direction_importance(torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1.0, 5.5 / 6, 0.55, 0.1], dtype=torch.float64))
    assert (direction_importance(torch.zeros(3)) == 0).all()
    old, new = rows(), rows(seed=1)
    known = input_directions(old.T @ old, threshold=0.9)
    importance = direction_importance(torch.linalg.svdvals(old)[: known.shape[1]])
    every = torch.cat([known, input_directions(new.T @ new, known, threshold=0.95)], dim=1)
    # the authors' way: the left vectors of the projected rows, squared, on squared singular values
    _, s, v = torch.linalg.svd(new @ known @ known.T, full_matrices=False)
    k = known.shape[1]
    on_old = ((known.T @ v[:k].T).square() @ s[:k].square()).sqrt()
    on_new = torch.linalg.svdvals(new - new @ known @ known.T)[: every.shape[1] - k]
    expected = direction_importance(torch.cat([on_old, on_new]))
    expected[:k] += importance
    found = accumulated_importance(new.T @ new, every, importance)
    torch.testing.assert_close(found, expected.clamp(0, 1))
    assert found.max() == 1


def test_oja_steps_are_those_on_rows_and_span_the_principal_directions():
    x = rows()
    v = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0].T
    y = x @ v.T
    torch.testing.assert_close(oja_step(v, x.T @ x / 60, 0.02), v + 0.02 * y.T @ (x - y @ v) / 60)
    _, _, vectors = torch.linalg.svd(x, full_matrices=False)
    basis = torch.linalg.qr(oja_directions(x.T @ x, 3))[0]
    cosine = torch.linalg.svdvals(vectors[:3] @ basis).min()
    assert torch.acos(cosine.clamp(max=1)) < 1e-2


def test_the_nearest_tasks_are_trusted():
    bases = list(torch.eye(6).split(2, dim=1))
    assert trust_region(torch.tensor([[3.0, 0.0, 2.0, 2.0, 0.1, 0.0]]), bases) == [0, 1]
    assert trust_region(torch.ones(2, 6), bases, most=1) == [0]
    assert trust_region(torch.zeros(2, 6), bases) == []


def test_the_null_space_is_what_the_least_eigenvalue_allows():
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    values = torch.tensor([50.0, 12.0, 9.9, 2.0, 1.0], dtype=torch.float64)
    moment = basis * values @ basis.T
    for scale in (1e-8, 1.0, 1e8):
        protected, null = null_space(scale * moment)
        torch.testing.assert_close(protected @ protected.T, basis[:, :2] @ basis[:, :2].T)
        torch.testing.assert_close(null @ null.T, basis[:, 2:] @ basis[:, 2:].T)
        torch.testing.assert_close(null_share(scale * moment, protected), 12.9 / values.sum())
    assert null_space(moment, factor=1.0)[0].shape == (5, 4)
    assert null_space(moment, factor=50.1)[0].shape == (5, 0)
    with pytest.raises(ValueError, match=r"`factor` must be at least 1, got 0.5"):
        null_space(moment, 0.5)


def test_a_least_eigenvalue_of_zero_leaves_the_exact_null_space():
    x = torch.randn(3, 8, dtype=torch.float64)
    protected, null = null_space(x.T @ x)
    assert (protected.shape, null.shape) == ((8, 3), (8, 5))
    assert (x @ null).abs().max() < 1e-12
    assert null_share(x.T @ x, protected) < 1e-14
    for moment in (torch.zeros(4, 4), torch.eye(4), torch.full((4, 4), torch.nan)):
        assert null_space(moment)[0].shape == (4, 0)
    assert null_share(torch.zeros(4, 4), torch.eye(4)[:, :1]) == 0


def test_a_scaled_weight_begins_as_the_weight_and_acts_in_the_subspace_alone():
    basis, rest = torch.linalg.qr(torch.randn(6, 6))[0].split([2, 4], dim=1)
    weight, scale = torch.randn(3, 6), torch.eye(2, requires_grad=True)
    start = scaled_weight(weight, basis, scale)
    assert torch.equal(start, weight)
    start.sum().backward()
    torch.testing.assert_close(scale.grad, (weight @ basis).T @ torch.ones(3, 6) @ basis)
    other = torch.randn(2, 2)
    turned = scaled_weight(weight, basis, other)
    torch.testing.assert_close(turned, weight - weight @ basis @ basis.T + weight @ basis @ other @ basis.T)
    torch.testing.assert_close(turned @ rest, weight @ rest)
    with pytest.raises(ValueError, match=r"must fit, got \(3, 6\), \(6, 2\) and \(3,\)"):
        scaled_weight(weight, basis, torch.ones(3))
