"""Optima that are known on paper."""

import pytest
import torch
from torch import nn

from lightning_collapse.penalties import EWC, L2SP, L2Init, SynapticIntelligence
from tests.penalties.references import OnlineEWCReference, softmax_regression, task


def minimize(parameters, loss, penalties, steps=4000, lr=0.1):
    """Gradient descent with penalties, as a training loop calls them."""
    for penalty in penalties:
        penalty.start(parameters)
    optimizer = torch.optim.SGD(parameters.values(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        for penalty in penalties:
            penalty.observe(parameters)
        for penalty in penalties:
            penalty.add_gradients(parameters)
        optimizer.step()
        for penalty in penalties:
            penalty.after_step(parameters)


def linear(outputs=2, inputs=4):
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)


def regression(index, n=64, orthogonal=False):
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    if orthogonal:
        x = torch.linalg.qr(x).Q * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    return x, torch.randn(n, 2, generator=generator, dtype=torch.float64)


def solve(*pairs):
    """Least squares on all of them, each with the mean over its samples."""
    gram = sum(x.T @ x / len(x) for x, _ in pairs)
    return torch.linalg.solve(gram, sum(x.T @ y / len(x) for x, y in pairs)).T


def half_squares(model, x, y):
    return lambda: ((model(x) - y) ** 2).sum() / (2 * len(x))


def ewc_after(tasks, **arguments):
    """Weights after a sequence of regressions; the Gaussian Fisher of each is the mean of x^2."""
    model, ewc = linear(), EWC(weight=1.0, likelihood="gaussian", n_samples=None, **arguments)
    parameters = dict(model.named_parameters())
    for x, y in tasks:
        minimize(parameters, half_squares(model, x, y), [ewc], steps=800, lr=0.2)
        ewc.consolidate(model, [(x, y)])
    return model.weight.detach()


def test_diagonal_ewc_is_joint_least_squares_where_the_gram_matrix_is_diagonal():
    tasks = [regression(0, orthogonal=True), regression(1), regression(2)]
    tasks[0] = (tasks[0][0] * 4, tasks[0][1])
    torch.testing.assert_close(ewc_after(tasks[:2]), solve(*tasks[:2]), rtol=1e-6, atol=1e-8)


def test_diagonal_ewc_is_least_squares_with_the_diagonal_of_the_gram_matrix():
    (x1, y1), (x2, y2) = regression(0), regression(1)
    first, second = solve((x1, y1)), x2.T @ x2 / len(x2)
    fisher = (x1**2).mean(dim=0).diag()
    expected = torch.linalg.solve(second + fisher, x2.T @ y2 / len(x2) + fisher @ first.T).T
    torch.testing.assert_close(ewc_after([(x1, y1), (x2, y2)]), expected, rtol=1e-6, atol=1e-8)


def test_online_ewc_has_one_anchor_and_forgets_by_gamma():
    penalty, reference = EWC(3.0, n_samples=None, online=True, gamma=0.7), OnlineEWCReference(3.0)
    model = softmax_regression()
    parameters = dict(model.named_parameters())
    for index in range(3):
        x, y = task(index)
        penalty.start(parameters)
        penalty.consolidate(model, [(x, y)])
        reference.end({n: p.detach().clone() for n, p in parameters.items()}, x, y)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter += torch.randn_like(parameter)
        expected = reference.value(parameters)
        torch.testing.assert_close(penalty.value(parameters), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("normalize", "read"), [("max", torch.max), ("trace", torch.mean)])
def test_normalized_fisher(normalize, read):
    plain, normed = EWC(n_samples=None), EWC(n_samples=None, normalize=normalize)
    model, (x, y) = softmax_regression(), task(0)
    tables = []
    for penalty in (plain, normed):
        penalty.start(dict(model.named_parameters()))
        penalty.consolidate(model, [(x, y)])
        tables.append(torch.cat([part.flatten() for part in penalty.memory["importance"].values()]))
    torch.testing.assert_close(tables[1], tables[0] / read(tables[0]))


def test_estimator_follows_the_number_of_outputs():
    for outputs, estimator in ((20, "exact"), (21, "sample")):
        torch.manual_seed(0)
        model = nn.Linear(4, outputs)
        x = torch.randn(16, 4)
        found = []
        for chosen in (None, estimator):
            penalty = EWC(estimator=chosen)
            penalty.start(dict(model.named_parameters()))
            penalty.consolidate(model, (batch for batch in ((x[:8], None), (x[8:], None))))  # each batch once
            found.append(penalty.memory["importance"]["weight"])
        assert torch.equal(*found)


def test_l2_init_moves_the_optimum_toward_the_start():
    theta = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    h, m, start = 2.0, torch.tensor([1.0, 5.0], dtype=torch.float64), theta.detach().clone()
    minimize({"theta": theta}, lambda: h / 2 * ((theta - m) ** 2).sum(), [L2Init(0.3)], steps=500)
    torch.testing.assert_close(theta.detach(), (h * m + 0.6 * start) / (h + 0.6))


def test_l2_sp_moves_the_old_toward_the_start_and_the_new_toward_zero():
    old = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    new = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    penalty = L2SP(weight=0.5, new_weight=0.25, new=["new"])
    minimize({"old": old, "new": new}, lambda: ((old - 1) ** 2 + (new - 1) ** 2).sum() / 2, [penalty], steps=500)
    torch.testing.assert_close(old.detach(), torch.tensor([(1 + 0.5 * 3) / 1.5], dtype=torch.float64))
    torch.testing.assert_close(new.detach(), torch.tensor([1 / 1.25], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'nose'.*matches no parameter"):
        L2SP(new=["nose"]).start({"old": old})


def test_path_integral_is_the_drop_of_the_loss():
    a = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
    penalty = SynapticIntelligence(weight=1.0, damping=1e-12)
    # half the sum of a theta^2: all of it, 7.5, is lost on the way to zero
    minimize({"theta": theta}, lambda: (a * theta**2).sum() / 2, [penalty], steps=7000, lr=1e-3)
    assert penalty.memory["path"]["theta"].sum().item() == pytest.approx(7.5, rel=5e-3)
    holder = nn.ParameterDict({"theta": theta})
    penalty.consolidate(holder)
    torch.testing.assert_close(penalty.memory["importance"]["theta"], a / 2, rtol=5e-3, atol=0)


def test_weights_that_have_raised_the_loss_are_not_pushed_away():
    theta = torch.zeros(1, requires_grad=True)
    penalty = SynapticIntelligence()
    penalty.start({"theta": theta})
    theta.grad = torch.ones(1)
    penalty.observe({"theta": theta})
    with torch.no_grad():
        theta += 1.0  # uphill
    penalty.after_step({"theta": theta})
    penalty.consolidate(nn.ParameterDict({"theta": theta}))
    assert penalty.memory["importance"]["theta"].item() == 0.0


def test_importance_that_is_not_finite_is_left_out():
    model, penalty = softmax_regression(), EWC(n_samples=None)
    penalty.start(dict(model.named_parameters()))
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="not finite; the task is not remembered"):
        penalty.consolidate(model, [task(0)])
    assert not penalty.memory["importance"]
    with pytest.raises(ValueError, match="Pass it a loader"):
        penalty.consolidate(model)
    with pytest.raises(ValueError, match="knows no parameter"):
        EWC().consolidate(model, [task(0)])
