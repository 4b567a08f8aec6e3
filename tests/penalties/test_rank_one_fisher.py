"""The mean gradient and the second moment along it, by forward mode and by two backward passes."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse.penalties import diagonal_fisher, rank_one_fisher
from tests.penalties.models import CASES, batched, case


def by_loop(model, data, loss):
    """Mean gradient and coefficient from one gradient per sample."""
    model.eval()
    named = dict(model.named_parameters())
    rows = []
    for x, y in batched(data, 1):
        found = torch.autograd.grad(
            loss(functional_call(model, named, (x,)), y), list(named.values()), allow_unused=True
        )
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)])
    model.train()
    mean = {name: torch.stack(parts).mean(dim=0) for name, parts in zip(named, zip(*rows, strict=True), strict=True)}
    flat = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    mu = flat.mean(dim=0)
    return mean, (flat @ mu).square().mean() / mu.square().sum().square()


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_samples(name):
    model, data = case(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mean, coefficient = by_loop(model, data, cross_entropy)
    random = torch.get_rng_state()
    found = rank_one_fisher(model, batched(data, 4))
    assert found.count == 9
    torch.testing.assert_close(found.mean, mean, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.coefficient, coefficient, rtol=1e-8, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_rank_one_shares_are_those_of_a_loop(name):
    """Of modules whose gradients have a rule; of the diagonal, which squares them anyway, of all."""
    model, data = case(name)
    named = dict(model.named_parameters())
    model.eval()
    rows = []
    for x, y in batched(data, 1):
        found = torch.autograd.grad(
            cross_entropy(functional_call(model, named, (x,)), y), list(named.values()), allow_unused=True
        )
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)])
    modules = {key.rpartition(".")[0] or "self" for key in named}
    rank_one, diagonal = rank_one_fisher(model, batched(data, 4)), diagonal_fisher(model, batched(data, 4), "empirical")
    assert {*diagonal.rank_one_shares} == {*modules, "all"}
    assert {*rank_one.rank_one_shares} <= {*modules, "all"}
    for module in (*modules, "all"):
        own = [i for i, key in enumerate(named) if module == "all" or (key.rpartition(".")[0] or "self") == module]
        flat = torch.stack([torch.cat([row[i].flatten() for i in own]) for row in rows])
        squares, n = flat.square().sum(dim=1).mean(), len(flat)
        share = (n * flat.mean(dim=0).square().sum() - squares) / (n - 1) / squares
        for found in (rank_one.rank_one_shares, diagonal.rank_one_shares):
            if module in found:
                torch.testing.assert_close(found[module], share, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_only_the_first_samples_tell_of_shares():
    """So that the rest costs no sum of gradients: up to 128, in whole batches."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(300, 5), torch.randint(3, (300,))
    for estimate in (rank_one_fisher, lambda *args: diagonal_fisher(*args, "empirical")):
        whole, first = estimate(model, batched((x, y), 50)), estimate(model, batched((x[:150], y[:150]), 50))
        assert {*whole.rank_one_shares} == {"self", "all"}
        torch.testing.assert_close(whole.rank_one_shares, first.rank_one_shares)
    assert diagonal_fisher(model, batched((x, y), 50)).rank_one_shares == {}


def test_without_forward_mode():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    class Doubled(nn.Linear):
        def forward(self, x):
            return Backward.apply(super().forward(x))

    torch.manual_seed(0)
    model, data = Doubled(6, 4).double(), (torch.randn(9, 6).double(), torch.randint(4, (9,)))
    mean, coefficient = by_loop(model, data, cross_entropy)
    found = rank_one_fisher(model, batched(data, 4))
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.coefficient, coefficient)


def test_all_of_the_fisher_if_gradients_are_collinear():
    model, x = nn.Linear(3, 1, bias=False).double(), torch.randn(1, 3).double()
    scales = torch.rand(8, 1).double() + 0.5
    data = (x * scales, torch.zeros(8, 1).double())
    found = rank_one_fisher(model, [data], likelihood="gaussian")
    mu = found.mean["weight"]
    gradients = (model(data[0]) - data[1]).detach() * data[0]
    torch.testing.assert_close(found.coefficient * mu.T @ mu, gradients.T @ gradients / 8)


def test_a_loss_of_the_user_s_own():
    model, data = case("perceptron")
    target = torch.randn(9, 4).double()
    mean, coefficient = by_loop(model, (data[0], target), lambda z, y: mse_loss(z, y, reduction="sum"))
    found = rank_one_fisher(
        model, [(data[0], target)], losses=lambda module, batch: (module(batch[0]) - batch[1]).square().sum(dim=1)
    )
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.coefficient, coefficient)
    with pytest.raises(ValueError, match="`losses` must return one loss per sample"):
        rank_one_fisher(model, [(data[0], target)], losses=lambda module, batch: module(batch[0]))


def test_noise_and_order_are_the_same_both_times():
    model = nn.Linear(1, 1, bias=False).double()
    noisy = lambda module, batch: module(torch.randn(len(batch[0]), 1).double())[:, 0]  # noqa: E731
    loader = DataLoader(TensorDataset(torch.zeros(4, 1)), 4, shuffle=True)
    torch.manual_seed(5)
    found = rank_one_fisher(model, loader, losses=noisy)
    torch.manual_seed(5)
    again = rank_one_fisher(model, loader, losses=noisy)
    assert torch.equal(found.coefficient, again.coefficient)
    # the second moment of what the mean was taken of is not below the square of that mean
    assert found.coefficient >= 1


def test_some_samples_and_parameters():
    model, data = case("perceptron")
    mean, _ = by_loop(model, tuple(part[:5] for part in data), cross_entropy)
    found = rank_one_fisher(model, batched(data, 4), n_samples=5, parameters=["0.*"])
    assert found.count == 5
    torch.testing.assert_close(found.mean, {name: mean[name] for name in ("0.weight", "0.bias")})


def test_no_gradient_no_coefficient():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    found = rank_one_fisher(model, [(torch.randn(3, 2), torch.zeros(3, 1))], likelihood="gaussian")
    assert found.coefficient == 0


def test_bad_arguments():
    model, data = case("perceptron")
    with pytest.raises(ValueError, match="`loader` is read twice"):
        rank_one_fisher(model, iter([data]))
    with pytest.raises(ValueError, match="`loader` brought no samples"):
        rank_one_fisher(model, [])
    with pytest.raises(ValueError, match="`labels="):
        rank_one_fisher(model, [data[0]])
