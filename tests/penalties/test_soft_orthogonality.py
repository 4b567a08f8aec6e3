"""What is special about soft orthogonality: the norm along a vector that is kept, and what was released."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_collapse import WeightPenalty
from lightning_collapse.functional.regularization import soft_orthogonality
from lightning_collapse.penalties import SoftOrthogonality
from tests.penalties.toys import Classifier, flat, loader
from tests.toys import fit

KINDS = ["SO", "DSO", "MC", "SRIP"]


def weights(*shapes):
    torch.manual_seed(0)
    return {f"w{i}": torch.randn(shape, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_pull_is_the_derivative_of_the_exact_measure(kind):
    """Right after the start too: its 50 products have found the largest singular value."""
    parameters = weights((4, 6), (6, 4), (3, 2, 2, 2))
    penalty = SoftOrthogonality(0.5, kind)
    penalty.start(parameters)
    penalty.add_gradients(parameters)
    expected = 0.5 * sum(soft_orthogonality(weight, kind) for weight in parameters.values())
    torch.testing.assert_close(penalty.value(parameters), expected, rtol=1e-6, atol=0)
    for weight, pull in zip(parameters.values(), torch.autograd.grad(expected, parameters.values()), strict=True):
        torch.testing.assert_close(weight.grad, pull, rtol=1e-3, atol=1e-4)


def released(error, vector):
    first = error @ vector
    return (error @ (first / first.norm())).norm() ** 2


def test_the_released_form_is_one_product_with_a_new_vector_squared():
    parameters = weights((4, 6))
    penalty = SoftOrthogonality(1.0, "SRIP", released=True)
    penalty.start(parameters)
    [weight] = parameters.values()
    found, bound = [], soft_orthogonality(weight, "SRIP").detach() ** 2
    for _ in range(20):
        value = penalty.value(parameters)
        [pull] = torch.autograd.grad(value, weight)
        weight.grad = None
        penalty.add_gradients(parameters)
        torch.testing.assert_close(weight.grad, pull)
        penalty.after_step(parameters)
        found.append(value.item())
    assert len(set(found)) == 20
    assert max(found) <= bound * (1 + 1e-9)
    assert max(found) > 0.5 * bound  # as norms along vectors are that are near enough
    with pytest.raises(ValueError, match="`released` is of `kind='SRIP'` alone, got `kind='SO'`"):
        SoftOrthogonality(released=True)


@pytest.mark.parametrize(("kind", "as_released"), [*((kind, False) for kind in KINDS), ("SRIP", True)])
def test_exactly_orthonormal_weights_are_left_where_they_are(kind, as_released):
    parameters = {"w": torch.eye(3, 5).requires_grad_()}
    penalty = SoftOrthogonality(1.0, kind, as_released)
    penalty.start(parameters)
    penalty.add_gradients(parameters)
    assert penalty.value(parameters).item() == (2.0 if kind == "DSO" else 0.0)
    assert parameters["w"].grad.isfinite().all()
    assert kind == "MC" or not parameters["w"].grad.any()


@pytest.mark.parametrize(("kind", "weight"), [("SO", 0.1), ("DSO", 0.05), ("MC", 0.02), ("SRIP", 0.02)])
def test_descent_ends_at_orthonormal_rows_or_columns(kind, weight):
    parameters = weights((4, 6), (6, 4))
    parameters = {name: (w.detach() / w.detach().norm()).requires_grad_() for name, w in parameters.items()}
    penalty = SoftOrthogonality(weight, kind)
    penalty.start(parameters)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    for step in range(1500):
        if step == 1000:  # of the kinks: steps that are smaller
            optimizer.param_groups[0]["lr"] = 0.05
        optimizer.zero_grad()
        penalty.add_gradients(parameters)
        optimizer.step()
        penalty.after_step(parameters)
    for value in parameters.values():
        assert soft_orthogonality(value, "SRIP") < (1e-6 if kind in ("SO", "DSO") else 0.02)


def test_the_kept_vector_follows_weights_that_move():
    parameters = weights((5, 8))
    penalty = SoftOrthogonality(1.0, "SRIP")
    penalty.start(parameters)
    [weight] = parameters.values()
    goal = torch.randn(5, 8, dtype=torch.float64)
    for _ in range(300):
        with torch.no_grad():
            weight += 0.02 * (goal - weight)
        penalty.add_gradients(parameters)
        penalty.after_step(parameters)
    torch.testing.assert_close(penalty.value(parameters), soft_orthogonality(weight, "SRIP"), rtol=1e-3, atol=0)


def test_globs_choose_weights_and_biases_are_none():
    torch.manual_seed(0)
    model = Classifier()
    before = flat(model.head)
    still = nn.ParameterList([p.detach().clone() for p in model.encoder.parameters()])
    model.training_step = lambda batch, batch_idx: 0.0 * model(batch[0]).sum()
    trainer = fit(model, [WeightPenalty(SoftOrthogonality(0.1), parameters=["encoder.*"])], loader(0), max_epochs=5)
    assert torch.equal(flat(model.head), before)
    assert torch.equal(model.encoder[0].bias, still[1])
    assert soft_orthogonality(model.encoder[0].weight) < 0.1 * soft_orthogonality(still[0])
    assert trainer.callback_metrics["penalty/soft_orthogonality/value"] > 0
    with pytest.raises(MisconfigurationException, match=r"for weights of two dimensions or more.*encoder\.0\.bias"):
        fit(Classifier(), [WeightPenalty(SoftOrthogonality(), parameters=["*.bias"])], loader(0))


def test_weights_that_are_no_numbers_end_nothing():
    parameters = {"w": torch.full((3, 4), torch.nan).requires_grad_()}
    for kind in KINDS:
        penalty = SoftOrthogonality(1.0, kind)
        penalty.start(parameters)
        penalty.add_gradients(parameters)
        penalty.after_step(parameters)
        penalty.value(parameters)
        penalty.curvature(parameters)


def test_curvature_of_the_other_kinds():
    parameters = {"w": torch.diag(torch.tensor([2.0, 1.0])).requires_grad_()}
    found = {}
    for kind, form in [*((kind, False) for kind in KINDS), ("SRIP", True)]:
        penalty = SoftOrthogonality(0.5, kind, form)
        penalty.start(parameters)
        found[kind, form] = penalty.curvature(parameters).item()
    expected = {("SO", False): 22, ("DSO", False): 44, ("MC", False): 1, ("SRIP", False): 1, ("SRIP", True): 22}
    assert found == pytest.approx(expected)
