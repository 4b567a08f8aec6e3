"""Optima that are known on paper."""

import pytest
import torch
from torch import nn

from lightning_collapse.penalties import (
    EWC,
    KFACEWC,
    L2SP,
    MAS,
    L2Init,
    RankOneEWC,
    RWalk,
    SynapticIntelligence,
    diagonal_fisher,
    kronecker_factors,
)
from lightning_collapse.penalties.support.kronecker_sum import nearest_kronecker_product
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


def weights_after(penalty, tasks, steps=250):
    """After a sequence of regressions."""
    model = linear()
    parameters = dict(model.named_parameters())
    for x, y in tasks:
        minimize(parameters, half_squares(model, x, y), [penalty], steps=steps, lr=0.2)
        penalty.consolidate(model, [(x, y)])
    return model.weight.detach()


def ewc_after(tasks):
    """The Gaussian Fisher of each is the mean of x^2."""
    return weights_after(EWC(weight=1.0, likelihood="gaussian", n_samples=None), tasks, steps=800)


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


def test_kronecker_factored_ewc_is_joint_least_squares_of_all_tasks():
    tasks = [regression(index) for index in range(4)]
    penalty = KFACEWC(weight=1.0, likelihood="gaussian", n_samples=None)
    torch.testing.assert_close(weights_after(penalty, tasks), solve(*tasks), rtol=1e-6, atol=1e-8)
    bounded = KFACEWC(weight=1.0, likelihood="gaussian", n_samples=None, max_factors=1)
    torch.testing.assert_close(
        weights_after(bounded, tasks), solve(*tasks), rtol=1e-6, atol=1e-8
    )  # all have the same G
    [shapes] = [[[tuple(part.shape) for part in pair] for pair in pairs] for pairs in pairs_of(bounded)]
    assert shapes == [[(5, 5), (2, 2)]]
    assert [len(pairs) for pairs in pairs_of(penalty)] == [4]


def pairs_of(penalty):
    return [pairs for layer in penalty.state_dict()["layers"].values() for pairs in layer.values()]


def test_nearest_kronecker_product():
    torch.manual_seed(0)
    roots = [torch.randn(2, size, size, dtype=torch.float64) for size in (3, 4)]
    inputs, gradients = ([root @ root.T for root in pair] for pair in roots)
    a, g = nearest_kronecker_product((inputs[0], gradients[0]), (inputs[1], gradients[1]))
    products = sum(
        torch.einsum("ij,kl->ijkl", *pair).flatten(2).flatten(0, 1) for pair in zip(inputs, gradients, strict=True)
    )
    left, singular, right = torch.linalg.svd(products)
    expected = singular[0] * torch.outer(left[:, 0], right[0])
    torch.testing.assert_close(torch.outer(a.flatten(), g.flatten()), expected)
    assert torch.linalg.eigvalsh(a).min() >= 0
    assert torch.linalg.eigvalsh(g).min() >= 0
    nothing = nearest_kronecker_product((inputs[0], 0 * gradients[0]), (inputs[1], 0 * gradients[1]))
    assert not torch.kron(*nothing).any()


class Images(nn.Module):
    """Normalization has no factors; the convolution no bias."""

    def __init__(self, channels=2, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).tanh().flatten(1))


def far(model):
    """The model's parameters, elsewhere."""
    return {name: (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_() for name, p in model.named_parameters()}


def form(penalty, factors, here, there):
    """The penalty as the factors define it."""
    conv = (here["conv.weight"] - there["conv.weight"]).flatten(1)
    head = torch.cat([here["head.weight"] - there["head.weight"], (here["head.bias"] - there["head.bias"])[:, None]], 1)
    found = factors["conv.weight"], factors["head.weight"]
    return (
        penalty.weight
        / 2
        * sum(torch.trace(d.T @ f.gradients @ d @ f.inputs) for d, f in zip((conv, head), found, strict=True))
    )


def test_layers_without_factors_are_free_and_said_once(caplog):
    torch.manual_seed(0)
    model, batch = Images().double(), (torch.randn(9, 2, 4, 4).double(), torch.randint(3, (9,)))
    penalty = KFACEWC(2.0)
    with caplog.at_level("INFO"):
        for _ in range(2):
            penalty.start(dict(model.named_parameters()))
            penalty.consolidate(model, [batch])
    said = [record.getMessage() for record in caplog.records if "leaves parameters free" in record.getMessage()]
    assert [message.count("norm.weight, norm.bias.") for message in said] == [1]
    factors = kronecker_factors(model, [batch]).factors
    elsewhere = far(model)
    expected = 2 * form(penalty, factors, elsewhere, dict(model.named_parameters()))  # the same task twice
    torch.testing.assert_close(penalty.value(elsewhere), expected)
    penalty.add_gradients(elsewhere)
    pulled = [name for name, parameter in elsewhere.items() if parameter.grad is not None]
    assert pulled == ["conv.weight", "head.weight", "head.bias"]
    for name, pull in zip(pulled, torch.autograd.grad(expected, [elsewhere[name] for name in pulled]), strict=True):
        torch.testing.assert_close(elsewhere[name].grad, pull)
    alone = {"head.bias": far(model)["head.bias"]}  # weight and bias of a layer may have optimizers of their own
    penalty.add_gradients(alone)
    there = dict(model.named_parameters())
    [pull] = torch.autograd.grad(
        2 * form(penalty, factors, {**there, **alone}, {n: p.detach() for n, p in there.items()}), alone.values()
    )
    torch.testing.assert_close(alone["head.bias"].grad, pull)


def test_factors_grow_with_channels_and_lose_a_bias():
    torch.manual_seed(0)
    model, penalty = Images().double(), KFACEWC(1.0)
    penalty.start(dict(model.named_parameters()))
    penalty.consolidate(model, [(torch.randn(9, 2, 4, 4).double(), torch.randint(3, (9,)))])
    before = penalty.value(old := far(model))
    grown = Images(channels=3, classes=5).double()
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            parameter[tuple(slice(size) for size in old[name].shape)] = old[name]
    penalty.start(dict(grown.named_parameters()))
    torch.testing.assert_close(penalty.value(dict(grown.named_parameters())), before)
    penalty.add_gradients(dict(grown.named_parameters()))
    assert not grown.conv.weight.grad[:, 2:].any()
    assert not grown.head.bias.grad[3:].any()
    assert grown.conv.weight.grad[:, :2].abs().min() > 0
    with pytest.warns(UserWarning, match=r"dropped: head\.bias"):
        penalty.start({name: p for name, p in grown.named_parameters() if name != "head.bias"})
    still = far(grown)
    again = {name: parameter for name, parameter in still.items() if name != "head.bias"}
    torch.testing.assert_close(penalty.value(still), penalty.value(again))
    assert penalty.value(again) > 0
    penalty.add_gradients(still)
    assert still["head.bias"].grad is None


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
        tables.append(torch.cat([part.flatten() for part in penalty.state["importance"].values()]))
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
            found.append(penalty.state["importance"]["weight"])
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


def test_l2_sp_copies_no_weight_before_it_is_trained_and_knows_it_for_pretrained_then():
    base, adapter = nn.Parameter(torch.tensor([2.0, 5.0]), requires_grad=False), nn.Parameter(torch.zeros(1))
    first, penalty = L2SP(weight=0.5, new_weight=0.25), L2SP(weight=0.5, new_weight=0.25)
    first.start({"base": base, "adapter": adapter})
    assert first.state["anchor"].keys() == first.state["pretrained"].keys() == {"adapter"}
    penalty.load_state_dict(first.state_dict())
    grown = nn.Parameter(torch.tensor([2.0, 5.0, 7.0]), requires_grad=False)  # by one entry
    parameters = {"base": grown, "adapter": adapter}
    penalty.start(parameters)
    assert penalty.value(parameters) == 0
    grown.requires_grad_()
    penalty.add_gradients(parameters)
    assert grown.grad.tolist() == [0.0, 0.0, 0.25 * 7]
    with torch.no_grad():
        grown += 2
    grown.grad = None
    penalty.add_gradients(parameters)
    assert grown.grad.tolist() == [0.5 * 2, 0.5 * 2, 0.25 * 9]
    later = {**parameters, "late": nn.Parameter(torch.ones(1))}
    penalty.start(later)
    penalty.add_gradients(later)
    assert later["late"].grad.item() == 0.25


def test_path_integral_is_the_drop_of_the_loss():
    a = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
    penalty = SynapticIntelligence(weight=1.0, damping=1e-12)
    # half the sum of a theta^2: all of it, 7.5, is lost on the way to zero
    minimize({"theta": theta}, lambda: (a * theta**2).sum() / 2, [penalty], steps=7000, lr=1e-3)
    assert penalty.state["path"]["theta"].sum().item() == pytest.approx(7.5, rel=5e-3)
    holder = nn.ParameterDict({"theta": theta})
    penalty.consolidate(holder)
    torch.testing.assert_close(penalty.state["importance"]["theta"], a / 2, rtol=5e-3, atol=0)


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
    assert penalty.state["importance"]["theta"].item() == 0.0


@pytest.mark.parametrize("told", ["by the caller", "by the scale"])
def test_a_step_that_was_skipped_is_none_of_the_walk(told):
    """A scaler leaves it out, or an optimizer that takes the scale out itself does, on the device."""
    scale = torch.tensor(8.0) if told == "by the scale" else None
    importances = []
    for skipped in ([], [1, 3]):
        theta = torch.ones(3, requires_grad=True)
        penalty = RWalk(every_n_steps=3)
        penalty.start({"theta": theta})
        for step in range(7 + len(skipped)):
            theta.grad = theta.detach() * torch.tensor([1.0, 2.0, 4.0]) * (1 if scale is None else scale)
            if step in skipped:
                theta.grad[0] = torch.inf
            penalty.observe({"theta": theta}, scale)
            if step not in skipped:
                with torch.no_grad():
                    theta -= 0.1 * theta.grad / (1 if scale is None else scale)
            elif scale is None:
                penalty.skip_step()
                continue
            penalty.after_step({"theta": theta})
        penalty.consolidate(nn.ParameterDict({"theta": theta}))
        importances.append(penalty.state["importance"]["theta"])
    torch.testing.assert_close(*importances, rtol=0, atol=0)
    assert importances[0].any()


@pytest.mark.parametrize("make", [EWC, KFACEWC, MAS, RankOneEWC])
def test_importance_that_is_not_finite_is_left_out(make):
    model, penalty = softmax_regression(), make(n_samples=None)
    parameters = dict(model.named_parameters())
    penalty.start(parameters)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="not finite; the task is not remembered"):
        penalty.consolidate(model, [task(0)])
    assert penalty.value(parameters).item() == 0.0
    assert not penalty.state["anchor"]
    with pytest.raises(ValueError, match="Pass it a loader"):
        penalty.consolidate(model)


def test_penalties_that_were_not_started_know_nothing():
    with pytest.raises(ValueError, match="knows no parameter"):
        EWC().consolidate(softmax_regression(), [task(0)])


class Odd(nn.Module):
    """One trained weight that is complex, and a frozen one of bytes."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(6, dtype=torch.cfloat))
        self.codes = nn.Parameter(torch.ones(6, dtype=torch.uint8), requires_grad=False)
        self.lin = nn.Linear(6, 3)

    def forward(self, x):
        return self.lin((x * self.turn).real * self.codes)


@pytest.mark.parametrize("make", [EWC, KFACEWC, MAS, RankOneEWC, L2Init, L2SP, SynapticIntelligence, RWalk])
def test_weights_that_are_no_real_numbers_are_left_out_by_name(make):
    torch.manual_seed(0)
    model, data, penalty = Odd(), task(0, 16, torch.float32), make()
    parameters = dict(model.named_parameters())
    told = r"no real numbers: `turn` \(torch.complex64\), `codes` \(torch.uint8\)\."
    with pytest.warns(UserWarning, match=told):
        penalty.start(parameters)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        penalty.observe(parameters)
        penalty.add_gradients(parameters)
        optimizer.step()
        penalty.after_step(parameters)
    penalty.consolidate(model, [data])
    with torch.no_grad():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter += torch.randn_like(parameter)
    assert penalty.value(parameters).dtype == torch.float32
    assert penalty.value(parameters) > 0
    model.zero_grad()
    penalty.add_gradients(parameters)
    assert [name for name, p in parameters.items() if p.grad is not None and p.grad.any()] == ["lin.weight", "lin.bias"]


@pytest.mark.filterwarnings("ignore:No penalty holds")
def test_importance_of_real_weights_beside_others():
    torch.manual_seed(0)
    model, data = Odd(), task(0, 16, torch.float32)
    found = diagonal_fisher(model, [data], "empirical").values
    assert list(found) == ["lin.weight", "lin.bias"]
    p = model(data[0]).softmax(dim=1).detach() - nn.functional.one_hot(data[1], 3)
    torch.testing.assert_close(found["lin.bias"], p.square().mean(dim=0))
