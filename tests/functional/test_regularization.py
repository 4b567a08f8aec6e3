"""Orthogonality, Jacobians and sample weights against slow references in ``float64``, and at their closed forms."""

import pytest
import torch
from torch import nn

from lightning_collapse.functional.regularization import (
    decorrelating_weights,
    gram_error,
    jacobian_homeostasis,
    jacobian_norm,
    parseval_step,
    soft_orthogonality,
)
from lightning_collapse.losses import JacobianHomeostasis

KINDS = ["SO", "DSO", "MC", "SRIP"]
SHAPES = [(4, 4), (3, 7), (7, 3), (3, 2, 2, 2), (1, 5)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(*shape):
    matrix = normal(*shape).flatten(1)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u @ v).view(shape)


def published(weight, kind):
    """On the smaller side, but for DSO on both."""
    w = weight.flatten(1)
    inner, outer = w.T @ w - torch.eye(w.shape[1]).double(), w @ w.T - torch.eye(w.shape[0]).double()
    error = inner if w.shape[1] <= w.shape[0] else outer
    return {
        "SO": error.square().sum(),
        "DSO": inner.square().sum() + outer.square().sum(),
        "MC": error.abs().max(),
        "SRIP": torch.linalg.svdvals(error)[0],
    }[kind]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_orthogonality_is_the_published_one(kind, shape):
    weight = normal(*shape, seed=1).requires_grad_()
    found, expected = soft_orthogonality(weight, kind), published(weight, kind)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, weight)[0] for value in (found, expected)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_orthonormal_weights_have_the_floor_and_no_gradient_that_is_no_number(kind, shape):
    weight = orthonormal(*shape).requires_grad_()
    rows, columns = weight.flatten(1).shape
    floor = abs(rows - columns) if kind == "DSO" else 0
    value = soft_orthogonality(weight, kind)
    torch.testing.assert_close(value.item(), float(floor), atol=1e-12, rtol=0)
    exact = torch.eye(rows, columns).requires_grad_()
    value = soft_orthogonality(exact, kind)
    assert value.item() == floor
    assert torch.autograd.grad(value, exact)[0].isfinite().all()
    assert soft_orthogonality(exact.bfloat16(), kind).dtype == torch.float32


def test_the_wrong_side_has_a_floor_and_is_never_taken():
    weight = orthonormal(3, 7)
    assert gram_error(weight).shape == (3, 3)
    assert (weight.T @ weight - torch.eye(7)).square().sum().item() == pytest.approx(4)
    with pytest.raises(ValueError, match=r"`kind` must be one of .*'SRIP'.*got 'srip'"):
        soft_orthogonality(weight, "srip")


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_a_parseval_step_moves_singular_values_alone(shape):
    weight = normal(*shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(parseval_step(weight, 0.1), u @ torch.diag(s * (1.1 - 0.1 * s**2)) @ v)
    torch.testing.assert_close(parseval_step(orthonormal(*shape), 0.1), orthonormal(*shape))
    near = 0.5 * orthonormal(*shape)
    for _ in range(400):
        near = parseval_step(near, 0.02)
    torch.testing.assert_close(near, orthonormal(*shape), atol=1e-6, rtol=0)


def all_axes(samples, dim):
    """Probes that make it exact: the same signs for all samples, orthogonal over draws."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    hadamard = torch.kron(signs, signs)[:, :dim]
    return hadamard.unsqueeze(1).expand(4, samples, dim)


def jacobians(field, state):
    of_one = lambda row: torch.autograd.functional.jacobian(lambda x: field(x[None])[0], row, create_graph=True)  # noqa: E731
    return torch.stack([of_one(row) for row in state])


def test_homeostasis_is_half_the_antisymmetric_norm_and_so_is_its_gradient():
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    state, probes = normal(3, 4), all_axes(3, 4)
    jacobian = jacobians(field, state)
    expected = (jacobian - jacobian.mT).square().sum() / (2 * 4 * 3)
    found = jacobian_homeostasis(field, state, probes)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(v, field.parameters(), materialize_grads=True) for v in (found, expected)]
    torch.testing.assert_close(*gradients)
    forward = torch.einsum("nij,pnj->pni", jacobian, probes)
    twice = torch.einsum("nij,pnj->pni", jacobian, forward)
    published = (forward.square().sum() - (probes * twice).sum()) / (4 * 3 * 4)
    torch.testing.assert_close(found, published)
    norm = jacobian_norm(field, state, probes)
    torch.testing.assert_close(norm, jacobian.square().sum() / 3)


def test_random_probes_have_the_right_mean():
    matrix, state = normal(6, 6, seed=1), torch.zeros(6).double()
    draws = torch.stack([jacobian_homeostasis(lambda x: matrix @ x, state, normal(1, 6, seed=i)) for i in range(400)])
    error = draws.mean() - (matrix - matrix.T).square().sum() / 12
    assert error.abs() < 4 * draws.std() / 400**0.5
    assert draws.min() > 0


def test_a_symmetric_jacobian_has_no_loss_and_no_gradient_for_any_probe():
    weight = (normal(5, 5) + normal(5, 5).T).requires_grad_()
    value = jacobian_homeostasis(lambda x: x @ weight.T, normal(2, 5), normal(1, 2, 5, seed=2))
    assert value.item() < 1e-28
    assert torch.autograd.grad(value, weight)[0].abs().max() < 1e-13


def test_what_a_jacobian_is_refused_for():
    with pytest.raises(ValueError, match=r"`field` must return the shape of the state, \(2, 3\), got \(2, 4\)"):
        jacobian_homeostasis(nn.Linear(3, 4), torch.zeros(2, 3), torch.ones(1, 2, 3))
    for probes in (torch.ones(2, 3), torch.ones(0, 2, 3)):
        with pytest.raises(ValueError, match=r"`probes` must have the shape \(P, 2, 3\)"):
            jacobian_homeostasis(nn.Linear(3, 3), torch.zeros(2, 3), probes)
    with pytest.raises(ValueError, match="`probes` is empty"):
        jacobian_norm(nn.Linear(3, 3), torch.zeros(2, 3), torch.ones(0, 2, 3))
    with pytest.raises(ValueError, match="`probes` must be an integer of at least 1"):
        JacobianHomeostasis(probes=0)


def test_the_loss_draws_by_a_counter_and_makes_a_block_symmetric():
    torch.manual_seed(0)
    block, loss, before = nn.Linear(6, 6), JacobianHomeostasis(), torch.get_rng_state()
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(block, torch.zeros(4, 6))
        value.backward()
        first = value.item() if first is None else first
        optimizer.step()
    assert value.item() < 1e-3 * first
    assert torch.equal(torch.get_rng_state(), before)
    other, state = nn.Linear(6, 6), torch.randn(2, 6)
    resumed = JacobianHomeostasis()
    resumed.load_state_dict(loss.state_dict())
    assert [resumed(other, state).item() for _ in range(2)] == [loss(other, state).item() for _ in range(2)]
    assert len({loss(other, state).item() for _ in range(3)}) == 3
    loss.eval()
    with torch.no_grad():
        assert loss(other, state).item() == loss(other, state).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(other, state).dtype == torch.float32


@pytest.fixture(scope="module")
def entangled():
    """64 rows of 6 features, of which the first two move together without a correlation of their own."""
    z = normal(64, 6)
    z[:, 1] = z[:, 0].square() + 0.3 * z[:, 1]
    return z


def test_fewer_samples_are_what_decorrelation_costs(entangled):
    """Without a penalty little covariance and few samples are left, with a large one nearly all of both."""
    state = torch.get_rng_state()
    none, some, much = (decorrelating_weights(entangled, penalty) for penalty in (0.0, 10.0, 1000.0))
    assert none.covariance < some.covariance < much.covariance < 1
    assert none.effective_samples < some.effective_samples < much.effective_samples < 64
    assert none.covariance < 0.3
    assert none.effective_samples < 25
    assert much.covariance > 0.7
    assert much.effective_samples > 62
    assert torch.equal(torch.get_rng_state(), state)
    for found in (none, some, much):
        assert found.weights.sum().item() == pytest.approx(1)
        assert found.weights.min() > 0
        assert found.effective_samples.item() == pytest.approx(1 / found.weights.square().sum().item())


def test_longer_descent_has_a_minimum_inside(entangled):
    """With a penalty; relative terms, as released, would go on until one sample is left."""
    few, many = (decorrelating_weights(entangled, 10.0, steps=steps) for steps in (100, 1000))
    torch.testing.assert_close(few.effective_samples, many.effective_samples, rtol=0.05, atol=0)
    assert few.effective_samples > 15


def test_saliency_chooses_the_pairs(entangled):
    """Fewer pairs are easier to decorrelate; how large the numbers are does not matter."""
    pair = torch.zeros(6).index_fill(0, torch.tensor([0, 1]), 1.0)
    chosen = decorrelating_weights(entangled, 10.0, saliency=pair)
    outer = decorrelating_weights(entangled, 10.0, saliency=7 * torch.outer(pair, pair))
    torch.testing.assert_close(chosen.weights, outer.weights)
    assert chosen.covariance < 0.5 * decorrelating_weights(entangled, 10.0).covariance
    lone = decorrelating_weights(entangled, 10.0, saliency=torch.diag(torch.ones(6)))
    torch.testing.assert_close(lone.weights, torch.full((64,), 1 / 64).double())
    assert lone.covariance.item() == 1


def test_constant_features_and_half_precision_are_taken():
    flat = decorrelating_weights(torch.ones(8, 3))
    torch.testing.assert_close(flat.weights, torch.full((8,), 1 / 8))
    assert flat.covariance.isfinite()
    assert decorrelating_weights(torch.randn(8, 3).bfloat16()).weights.dtype == torch.float32
    features = torch.randn(8, 3, requires_grad=True)
    assert not decorrelating_weights(features).weights.requires_grad


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        (torch.ones(4), {}, r"`features` must be floating point of shape \(N, D\).*got torch.float32 \(4,\)"),
        (torch.ones(4, 2).long(), {}, "got torch.int64"),
        (
            torch.ones(4, 2),
            {"saliency": torch.ones(3)},
            r"`saliency` must have the shape \(2,\) or \(2, 2\).*\(3,\)",
        ),
        (torch.ones(4, 2), {"penalty": -1.0}, "`penalty` must not be negative"),
        (torch.ones(4, 2), {"steps": 0}, "`steps` must be an integer"),
    ],
)
def test_what_sample_weights_are_refused_for(features, arguments, message):
    with pytest.raises(ValueError, match=message):
        decorrelating_weights(features, **arguments)
