"""Kronecker factors: exact where theory says so, and the sums over samples and positions that they are defined by."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, unfold

from lightning_collapse.penalties import diagonal_fisher, kronecker_factors
from tests.penalties.models import CLASSES, Tokens, batched, case, tokens


def with_ones(a):
    return torch.cat([a, torch.ones_like(a[:, :1])], dim=1)


def test_linear_regression_is_exact():
    model, x = nn.Linear(4, 3).double(), torch.randn(10, 4).double()
    found = kronecker_factors(model, [x[:7], x[7:]], likelihood="gaussian")
    assert (found.count, found.left_out) == (10, [])
    a = with_ones(x)
    torch.testing.assert_close(found.factors["weight"].inputs, a.T @ a / 10)
    torch.testing.assert_close(found.factors["weight"].gradients, torch.eye(3).double())
    assert found.factors["weight"].bias == "bias"


def test_one_sample_is_exact():
    model, data = case("perceptron", samples=1)
    found = kronecker_factors(model, [data], "empirical").factors
    model.eval()
    gradients = torch.autograd.grad(cross_entropy(model(data[0]), data[1]), list(model.parameters()))
    for (weight, bias), g in zip(
        (("0.weight", "0.bias"), ("2.weight", "2.bias")), batched_pairs(gradients), strict=True
    ):
        block = torch.cat([g[0], g[1].unsqueeze(1)], dim=1)
        factor = found[weight]
        assert factor.bias == bias
        product = torch.einsum("ab,oq->oaqb", factor.inputs, factor.gradients)
        torch.testing.assert_close(product, torch.einsum("oa,qb->oaqb", block, block))


def batched_pairs(items):
    return list(zip(items[::2], items[1::2], strict=True))


def test_the_last_layer_of_a_classifier():
    model, data = case("perceptron")
    model.eval()
    hidden = with_ones(model[:2](data[0]).detach())
    p = model(data[0]).softmax(dim=1).detach()
    found = kronecker_factors(model, batched(data, 4)).factors["2.weight"]
    torch.testing.assert_close(found.inputs, hidden.T @ hidden / 9)
    torch.testing.assert_close(found.gradients, (torch.diag(p.sum(dim=0)) - p.T @ p) / 9)


def test_a_convolution_is_a_linear_layer_on_patches():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, (3, 2), stride=2, padding=1, dilation=(1, 2)).double()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES).double())
    x = torch.randn(6, 2, 6, 7).double()
    y = torch.randint(CLASSES, (6,))
    model(x)
    patches = unfold(x, (3, 2), stride=2, padding=1, dilation=(1, 2)).transpose(1, 2)
    a = with_ones(patches.flatten(0, 1))
    before = conv(x).detach().requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(model[1:](before), y, reduction="sum"), before)[0]
    g = gradient.flatten(2).transpose(1, 2).flatten(0, 1)
    found = kronecker_factors(model, batched((x, y), 4), "empirical")
    factor = found.factors["0.weight"]
    torch.testing.assert_close(factor.inputs, a.T @ a / len(a))
    torch.testing.assert_close(factor.gradients, g.T @ g / 6)


def test_tokens_are_positions():
    torch.manual_seed(0)
    model, x, y = Tokens().double(), tokens(7), tokens(7)
    found = kronecker_factors(model, batched((x, y), 3), "empirical")
    a = with_ones(model.embed(x).detach().flatten(0, 1))
    torch.testing.assert_close(found.factors["hidden.weight"].inputs, a.T @ a / len(a))
    p = model(x).softmax(dim=-1).detach() - nn.functional.one_hot(y, 11)
    torch.testing.assert_close(found.factors["head.weight"].gradients, p.flatten(0, 1).T @ p.flatten(0, 1) / 7)
    assert found.left_out == ["embed.weight"]


def test_the_diagonal_of_the_product_is_that_of_the_fisher_where_inputs_are_constant():
    model, x = nn.Linear(3, 2), torch.randn(1, 3).repeat(6, 1)
    factor = kronecker_factors(model, [x]).factors["weight"]
    diagonal = torch.outer(factor.gradients.diagonal(), factor.inputs.diagonal())
    expected = diagonal_fisher(model, [x]).values
    torch.testing.assert_close(diagonal, torch.cat([expected["weight"], expected["bias"].unsqueeze(1)], dim=1))


def test_what_has_no_factors_is_named():
    model, data = case("shared")
    found = kronecker_factors(model, [data])
    assert list(found.factors) == ["twice.weight", "head.weight"]
    assert {"tied.weight", "scale", "norm.weight", "unused.weight"} < set(found.left_out)
    model.twice.bias.requires_grad_(False)
    factor = kronecker_factors(model, [data]).factors["twice.weight"]
    assert factor.bias is None
    assert factor.inputs.shape == (6, 6)


def test_the_first_samples_count():
    model, data = case("convolutions")
    some = kronecker_factors(model, batched(data, 4), n_samples=6)
    first = kronecker_factors(model, [tuple(part[:6] for part in data)])
    assert some.count == 6
    assert list(some.factors) == ["first.weight", "head.weight"]
    for name, factor in some.factors.items():
        torch.testing.assert_close(factor.inputs, first.factors[name].inputs)
        torch.testing.assert_close(factor.gradients, first.factors[name].gradients)


def test_bad_arguments():
    model, data = case("perceptron")
    with pytest.raises(ValueError, match="of the diagonal only"):
        kronecker_factors(model, [data], "batched")
    with pytest.raises(ValueError, match="no linear layer and no convolution"):
        kronecker_factors(nn.LayerNorm(4), [torch.randn(3, 4)])
    with pytest.raises(ValueError, match="`loader` brought no samples"):
        kronecker_factors(model, [])
