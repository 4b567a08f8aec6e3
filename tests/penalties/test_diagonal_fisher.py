"""The importance of every weight of any model is that of a loop over single samples, and the model does not notice."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_collapse.penalties import diagonal_fisher, mas_importance
from lightning_collapse.penalties.support import fisher_pass
from tests.penalties.models import CASES, Tokens, batched, by_loop, case, exact_losses, perceptron, tokens

LOSSES = {
    "exact": exact_losses,
    "empirical": lambda z, y: [cross_entropy(z, y)],
    "logits_reversal": lambda z, y: [cross_entropy(-z, y)],
}
RULES = {
    "perceptron": {"rule"},
    "convolutions": {"rule"},
    "lines": {"rule"},
    "attention": {"rule", "vmap"},
    "attention, tokens first": {"rule", "vmap"},
    "recurrent": {"rule", "loop"},
    "shared": {"rule", "vmap", "unused"},
}


def close(found, expected, **kwargs):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **kwargs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("estimator", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_samples(name, estimator):
    model, data = case(name)
    expected = by_loop(model, data, LOSSES[estimator])
    found = diagonal_fisher(model, batched(data, 4), estimator, chunk_size=3)
    assert found.count == 9
    assert set(found.methods.values()) == RULES[name]
    close(found.values, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_mas_equals_a_loop_over_samples(name):
    model, data = case(name)
    expected = by_loop(model, data, lambda z, y: [z.square().sum()], torch.abs)
    close(mas_importance(model, batched(data, 4)).values, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_batch_size_does_not_matter(name):
    model, data = case(name, dtype=torch.float32)
    whole = diagonal_fisher(model, batched(data, 9)).values
    for size in (1, 2, 4):
        close(diagonal_fisher(model, batched(data, size)).values, whole, rtol=1e-5, atol=1e-8)


def test_a_drawn_label_is_that_of_the_model():
    model, data = case("perceptron")
    expected = by_loop(model, data, exact_losses)
    many = tuple(part.repeat(4000, *[1] * (part.ndim - 1)) for part in data)
    found = diagonal_fisher(model, batched(many, 6000), "sample")
    close(found.values, expected, rtol=0.05, atol=0.02 * max(v.max().item() for v in expected.values()))
    again = diagonal_fisher(model, batched(data, 4), "sample", seed=1).values
    close(diagonal_fisher(model, batched(data, 4), "sample", seed=1).values, again, rtol=0, atol=0)
    other = diagonal_fisher(model, batched(data, 4), "sample", seed=2).values
    assert any(not torch.equal(value, again[name]) for name, value in other.items())


def test_softmax_regression_in_closed_form():
    model, x = nn.Linear(5, 3), torch.randn(20, 5)
    p = model(x).softmax(dim=1).detach()
    spread = p * (1 - p)
    found = diagonal_fisher(model, [x[:12], x[12:]]).values
    close(found, {"weight": spread.T @ x.square() / 20, "bias": spread.mean(dim=0)})


def test_two_classes_need_one_backward_pass_and_one_certain_class_is_no_accident():
    model, x = nn.Linear(2, 3), torch.randn(4, 2)
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.0, 200.0, 0.0]))
    found = diagonal_fisher(model, [x]).values
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found.values())


def test_linear_regression_in_closed_form():
    model, x, y = nn.Linear(4, 2), torch.randn(10, 4), torch.randn(10, 2)
    residual = (model(x) - y).detach()
    found = diagonal_fisher(model, [(x, y)], likelihood="gaussian").values
    close(found, {"weight": x.square().mean(dim=0).expand(2, 4), "bias": torch.ones(2)})
    found = diagonal_fisher(model, [(x, y)], "empirical", likelihood="gaussian").values
    close(found, {"weight": residual.square().T @ x.square() / 10, "bias": residual.square().mean(dim=0)})
    many = [x.repeat(5000, 1)]
    found = diagonal_fisher(model, many, "sample", likelihood="gaussian").values
    close(found, {"weight": x.square().mean(dim=0).expand(2, 4), "bias": torch.ones(2)}, rtol=0.03, atol=0)


def test_the_square_of_a_batch_gradient_depends_on_the_batch_size():
    """At an optimum it is (N - B) / (B (N - 1)) of the right one: drawn without replacement, means have that spread."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (200,), generator=generator)
    model = nn.Linear(3, 3).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def loss():
        optimizer.zero_grad()
        value = cross_entropy(model(x), y)
        value.backward()
        return value

    optimizer.step(loss)
    orders = [torch.randperm(200, generator=generator) for _ in range(100)]
    batches = [batch for order in orders for batch in batched((x[order], y[order]), 10)]
    biased = diagonal_fisher(model, batches, "batched")
    assert set(biased.methods.values()) == {"batch"}
    right = diagonal_fisher(model, [(x, y)], "empirical")
    ratio = sum(v.sum() for v in biased.values.values()) / sum(v.sum() for v in right.values.values())
    assert ratio.item() == pytest.approx(190 / (10 * 199), rel=0.05)
    x, y = batches[0]
    gradient = torch.autograd.grad(cross_entropy(model(x), y), model.weight)[0]
    close(
        {"weight": diagonal_fisher(model, batches[:1], "batched", parameters=["weight"]).values["weight"]},
        {"weight": gradient.square()},
    )


def test_a_sequence_is_a_sample():
    torch.manual_seed(0)
    model, x = Tokens().double(), tokens(7)
    y = tokens(7)
    y[:, 3] = -100
    expected = by_loop(model, (x, y), lambda z, y: [cross_entropy(z[0], y[0], reduction="sum")])
    close(diagonal_fisher(model, batched((x, y), 3), "empirical").values, expected)
    with pytest.raises(ValueError, match=r"'exact'.*\(B, C\).*\(7, 5, 11\)"):
        diagonal_fisher(model, [(x, y)])
    drawn = diagonal_fisher(model, [(x, y)], "sample")
    assert all((value >= 0).all() for value in drawn.values.values())


def test_the_first_samples_count():
    model, data = case("shared")
    few = tuple(part[:6] for part in data)
    expected = by_loop(model, few, exact_losses)
    found = diagonal_fisher(model, batched(data, 4), n_samples=6)
    assert found.count == 6
    close(found.values, expected)


def test_some_parameters():
    model, data = case("perceptron")
    model[0].bias.requires_grad_(False)
    expected = by_loop(model, data, exact_losses)
    assert "0.bias" not in expected
    close(diagonal_fisher(model, [data]).values, expected)
    found = diagonal_fisher(model, [data], parameters=["0.*"]).values
    close(found, {"0.weight": expected["0.weight"]})
    with pytest.raises(ValueError, match=r"`parameters`: '0.bias' matches no parameter .* 0.weight, 2.weight"):
        diagonal_fisher(model, [data], parameters=["0.bias"])
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        diagonal_fisher(model.requires_grad_(False), [data])


def test_sixteen_bits_are_summed_in_more():
    model, data = case("convolutions", dtype=torch.float32)
    half = tuple(part.bfloat16() if part.is_floating_point() else part for part in data)
    expected = diagonal_fisher(model.bfloat16().float(), [tuple(p.float() for p in half[:1]) + half[1:]])
    found = diagonal_fisher(model.bfloat16(), [half])
    assert set(found.methods.values()) == {"rule"}
    for name, value in found.values.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.norm(), expected.values[name].norm(), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_noticed(name):
    model, data = case(name, dtype=torch.float32)
    next(model.children()).eval()
    model.head = nn.Sequential(model.head, nn.Dropout(0.5)) if hasattr(model, "head") else None
    first, *_, last = model.parameters()
    first.grad = torch.ones_like(first)
    last.requires_grad_(False)
    kept = first.grad
    loader = DataLoader(list(zip(*data, strict=True)), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def facts():
        flags = [(m.training, getattr(m, "dropout", None)) for m in model.modules()]
        states = torch.get_rng_state(), loader.generator.get_state(), torch.from_numpy(np.random.get_state()[1])
        wanted = [p.requires_grad for p in model.parameters()]
        hooks = [len(m._forward_hooks) for m in model.modules()]
        return repr(flags), [s.clone() for s in states], random.getstate(), wanted, hooks

    before = facts()
    for estimator in ("exact", "sample", "batched"):
        diagonal_fisher(model, loader, estimator)
    mas_importance(model, loader)
    after = facts()
    assert all(torch.equal(*pair) for pair in zip(before[1], after[1], strict=True))
    assert before[0] == after[0]
    assert before[2:] == after[2:]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert first.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not first)


def test_a_buffer_that_moves_in_eval_mode_too_is_put_back():
    class Counts(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counts()
    diagonal_fisher(model, [torch.randn(4, 2)])
    assert model.calls == 0


def test_all_is_put_back_after_an_error():
    model, data = case("convolutions", dtype=torch.float32)
    with pytest.raises(RuntimeError):
        diagonal_fisher(model, [(data[0][..., :0], data[1])])
    assert model.training
    assert model.norm.training
    assert not model.first._forward_hooks


def test_under_no_grad_in_inference_mode_and_autocast():
    model, data = case("perceptron", dtype=torch.float32)
    expected = diagonal_fisher(model, [data]).values
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            close(diagonal_fisher(model, [data]).values, expected, rtol=0, atol=0)


def test_zero_gradients_of_the_first_batch_prove_nothing():
    """Tokens come first and their number is that of the samples: only a gradient shows which axis is which."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            hidden = self.inner(x.transpose(0, 1)).transpose(0, 1)
            return self.head((hidden * x.sum(dim=(1, 2), keepdim=True)).tanh().sum(dim=1))

    model = Turned().double()
    x = torch.randn(8, 4, 3, dtype=torch.float64)
    x[:4] = 0
    data = (x, torch.zeros(8, dtype=torch.long))
    expected = by_loop(model, data, lambda z, y: [cross_entropy(z, y)])
    close(
        diagonal_fisher(model, batched((x[:4], data[1][:4]), 4) + batched((x[4:], data[1][4:]), 4), "empirical").values,
        expected,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "true"}, "`estimator` takes one of 'exact'"),
        ({"likelihood": "poisson"}, "`likelihood` takes one of 'categorical', 'gaussian'"),
        ({"estimator": "logits_reversal", "likelihood": "gaussian"}, "needs `likelihood='categorical'`"),
        ({"n_samples": 0}, "`n_samples` must be at least 1, got 0"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"loader": []}, "`loader` brought no samples"),
        ({"loader": [torch.randn(3, 6)], "estimator": "empirical"}, "`labels=lambda batch: ...`"),
        ({"estimator": "empirical", "labels": lambda batch: batch[1].float()}, "`labels` must be whole numbers"),
        ({"outputs": lambda module, batch: {}}, "must return a tensor of shape"),
        ({"outputs": lambda module, batch: module(batch[0]).detach()}, "do not depend on any parameter"),
        ({"outputs": lambda module, batch: module(batch[0])[:, :1]}, "logits of shape"),
        ({"likelihood": "gaussian", "estimator": "empirical"}, "`labels` must have the outputs' shape"),
    ],
)
def test_bad_arguments(arguments, message):
    loader = arguments.pop("loader", [(torch.randn(3, 6), torch.zeros(3, dtype=torch.long))])
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(perceptron(), loader, **arguments)


def test_mas_in_closed_form():
    model, x = nn.Linear(4, 3, bias=False), torch.randn(10, 4)
    expected = (2 * model(x).unsqueeze(2) * x.unsqueeze(1)).abs().mean(dim=0).detach()
    torch.testing.assert_close(mas_importance(model, lambda: [x]).values["weight"], expected)
    assert mas_importance(model, [x], n_samples=4).count == 4


class Transposed(nn.Module):
    """As Hugging Face's ``Conv1D``."""

    def __init__(self):
        super().__init__()
        self.nf = 4
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x @ self.weight + self.bias


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.weight * (x * x.pow(2).mean(dim=-1, keepdim=True).add(1e-6).rsqrt())


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize(
    "layer",
    [
        Transposed,
        Scaled,
        Recomputed,
        lambda: nn.RMSNorm(4),
        lambda: nn.LayerNorm(4, bias=False),
        lambda: torch.compile(nn.Linear(4, 4), backend="eager"),
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten()
        ),
    ],
    ids=["Conv1D", "scaled", "checkpoint", "RMSNorm", "no bias", "compiled", "circular"],
)
def test_rules_of_further_layers(layer):
    model = nn.Sequential(nn.Linear(5, 4), layer(), nn.LazyLinear(3)).double()
    data = torch.randn(6, 5).double(), torch.randint(3, (6,))
    model(data[0])
    found = diagonal_fisher(model, batched(data, 4))
    close(found.values, by_loop(model, data, exact_losses))
    assert set(found.methods.values()) == {"rule"}


def test_a_long_pass_says_how_far_it_is(monkeypatch, caplog):
    model, data = case("perceptron")
    with caplog.at_level("INFO"):
        diagonal_fisher(model, batched(data, 4))
        assert not caplog.messages
        monkeypatch.setattr(fisher_pass, "PATIENCE", -1.0)
        diagonal_fisher(model, batched(data, 4))
    assert [message.partition(" after")[0] for message in caplog.messages] == [
        f"Importances of weights: {n} samples" for n in (4, 8, 9)
    ]
