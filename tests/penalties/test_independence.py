"""Whose gradient is whose: samples are taken apart rightly on every batch, or refused."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_collapse.penalties import EWC, diagonal_fisher, kronecker_factors, mas_importance
from lightning_collapse.penalties.support.fisher_pass import FisherPass
from lightning_collapse.penalties.support.output_gradients import Columns
from tests.penalties.models import CASES, batched, case


class Experts(nn.Module):
    """Tokens ``(B, T, 6)``, each to one of two experts by its sign."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        rows = x.flatten(0, 1)
        up = rows[:, 0] > 0
        found = torch.zeros_like(rows)
        for expert, own in ((self.a, up), (self.b, ~up)):
            found = found.index_add(0, own.nonzero()[:, 0], expert(rows[own]))
        return self.head(found.tanh().view_as(x).sum(dim=1))


def signed(signs):
    x = torch.randn(4, len(signs[0]), 6, dtype=torch.float64)
    x[..., 0] = torch.tensor(signs).double()
    return x


def ones(batches):
    """The same samples in batches of one."""
    return [x[None] for x in torch.cat(list(batches))]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-14)
        assert value.any()


@pytest.mark.parametrize(
    "signs",
    [
        ([[1, -1]] * 4, [[1, 1], [1, 1], [-1, -1], [-1, -1]]),  # as many rows as samples, at first each of its own
        ([[1]] * 4, [[1], [1], [-1], [-1]]),
        ([[1, 1], [1, 1], [-1, -1], [-1, -1]], [[1, -1]] * 4),
    ],
)
@pytest.mark.parametrize("estimate", [diagonal_fisher, mas_importance])
def test_experts_that_choose_their_tokens(signs, estimate):
    torch.manual_seed(0)
    model, batches = Experts().double(), [signed(s) for s in signs]
    found = estimate(model, batches)
    assert_same(found.values, estimate(model, ones(batches)).values)
    assert found.methods["a.weight"] == "loop"
    assert found.methods["head.weight"] == "rule"


def test_factors_need_rows_of_samples_on_every_batch():
    torch.manual_seed(0)
    batches = [signed([[1, -1]] * 4), signed([[1, 1], [1, 1], [-1, -1], [-1, -1]])]
    found = kronecker_factors(Experts().double(), batches)
    assert list(found.factors) == ["head.weight"]
    assert found.left_out == ["a.weight", "a.bias", "b.weight", "b.bias"]


class Coupled(nn.Module):
    def __init__(self, couple):
        super().__init__()
        self.lin, self.head, self.couple = nn.Linear(6, 6), nn.Linear(6, 3), couple

    def forward(self, x):
        return self.head(self.couple(self.lin(x)).tanh())


COUPLINGS = {
    "centered": lambda h: h - h.mean(dim=0),
    "rolled": lambda h: h + h.roll(1, 0),
    "attends": lambda h: (h @ h.T).softmax(dim=-1) @ h,
    "batch statistics": nn.BatchNorm1d(6, track_running_stats=False),
}


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("estimate", [diagonal_fisher, mas_importance])
def test_samples_that_depend_on_each_other_are_refused(coupling, estimate):
    torch.manual_seed(0)
    model = Coupled(COUPLINGS[coupling])
    with pytest.raises(ValueError, match=r"samples are not independent: gradients of `lin` on a batch"):
        estimate(model, [torch.randn(8, 6)])
    assert not model.lin._forward_hooks


def test_a_model_that_takes_whole_batches_only_is_refused():
    model = Coupled(lambda h: h.view(4, 2, 6).flip(0).view(8, 6))
    with pytest.raises(ValueError, match=r"not independent.*alone \(on a sample alone the model raises RuntimeError"):
        diagonal_fisher(model, [torch.randn(8, 6)])


def test_a_refusal_says_what_fits_and_that_fits():
    model, data = Coupled(COUPLINGS["centered"]), (torch.randn(8, 6), torch.randint(3, (8,)))
    with pytest.raises(ValueError, match="estimator='batched'"):
        diagonal_fisher(model, [data])
    found = diagonal_fisher(model, [data], "batched").values
    expected = torch.autograd.grad(cross_entropy(model(data[0]), data[1]), model.lin.weight)[0].square()
    torch.testing.assert_close(found["lin.weight"], expected)
    penalty = EWC(estimator="batched")
    penalty.start(dict(model.named_parameters()))
    penalty.consolidate(model, [data])
    torch.testing.assert_close(penalty.state["importance"]["lin.weight"], expected)


class Looked(nn.Module):
    """A batch brings a table; every sample attends to all of it, through weights that have no rule."""

    def __init__(self):
        super().__init__()
        self.cell, self.mix, self.head = nn.GRU(5, 5, batch_first=True), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x, table):
        keys = self.mix(self.cell(table[None])[0][0])
        return self.head((self.cell(x)[0][:, -1] @ keys.T).softmax(dim=-1) @ keys)


@pytest.mark.parametrize("samples", [4, 6, 1])
def test_a_table_as_long_as_the_batch_is_no_sample(samples):
    torch.manual_seed(0)
    model = Looked().double()
    table = torch.randn(4, 5, dtype=torch.float64)
    batches = [{"x": torch.randn(samples, 3, 5, dtype=torch.float64), "table": table} for _ in range(2)]
    apart = [{"x": x[None], "table": table} for batch in batches for x in batch["x"]]
    assert_same(diagonal_fisher(model, batches).values, diagonal_fisher(model, apart).values)


class SequenceFirst(nn.Module):
    """Takes ``(T, B, 6)``, and returns ``(B, 3)``."""

    def __init__(self, cell):
        super().__init__()
        self.inner, self.cell, self.head = nn.Linear(6, 6), cell, nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        hidden = self.cell(self.inner(x) * self.scale)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden[-1] + hidden.tanh().mean(dim=0))


@pytest.mark.parametrize("samples", [3, 5, 1])  # one with as many samples as tokens
@pytest.mark.parametrize("cell", [nn.GRU(6, 6), nn.TransformerEncoderLayer(6, 2, 8), nn.Linear(6, 6)])
def test_sequence_first(samples, cell):
    torch.manual_seed(0)
    model = SequenceFirst(cell).double()
    batches = [torch.randn(5, samples, 6, dtype=torch.float64) for _ in range(2)]
    apart = [x.unsqueeze(1) for batch in batches for x in batch.unbind(1)]
    assert_same(diagonal_fisher(model, batches).values, diagonal_fisher(model, apart).values)


@pytest.mark.parametrize("name", CASES)
def test_samples_sum_to_autograd_on_every_batch(name):
    """In the fast path and in the slow one."""
    model, (x, _) = case(name)
    for chunk in batched((x, x), 4):
        over = FisherPass(model, [chunk])
        column = torch.randn(len(chunk[0]), 4, dtype=torch.float64)
        found = over.sums(lambda _, outputs, column=column: Columns(1, lambda _: column.clone()), "signed").values
        model.eval()
        expected = torch.autograd.grad(model(chunk[0]), list(over.parameters.values()), column, allow_unused=True)
        for value, gradient in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(value, torch.zeros_like(value) if gradient is None else gradient)


def test_a_weight_that_is_used_elsewhere_on_a_later_batch():
    """The graph has another structure then, and the rule is compared anew."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            hidden = self.inner(x).tanh()
            return self.head(hidden @ self.inner.weight if x.sum() > 0 else hidden)

    torch.manual_seed(0)
    model = Sometimes().double()
    batches = [sign * torch.rand(4, 6, dtype=torch.float64) for sign in (-1, 1, -1)]
    found = diagonal_fisher(model, batches)
    assert_same(found.values, diagonal_fisher(model, ones(batches)).values)
    assert found.methods["inner.weight"] in ("vmap", "loop")
    assert found.methods["inner.bias"] == "rule"
