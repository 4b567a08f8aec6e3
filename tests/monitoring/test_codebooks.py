"""Codebooks: which look-ups are codes, what is drawn of them, and that looking changes nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, CollapseMonitor
from lightning_collapse.functional import assignment_null, assignment_perplexity
from lightning_collapse.monitoring import Codebooks
from tests.toys import PointKeeper, Toy, batches, fit, weights

CODES = 12
CPU = torch.device("cpu")


class Quantizer(Toy):
    """An autoencoder through the nearest of some codes; ``how`` they are looked up."""

    def __init__(self, how="module"):
        super().__init__()
        self.how = how
        if how == "module":
            self.book = nn.Embedding(CODES, 8)
        else:
            self.table = nn.Parameter(torch.randn(CODES, 8))
        self.decoder = nn.Linear(8, 16)
        self.scores = []

    @property
    def codes(self):
        return self.book.weight if self.how == "module" else self.table

    def training_step(self, batch, batch_idx):
        features = self.encoder(batch)
        with torch.no_grad():
            distances = torch.cdist(features, self.codes)
        self.scores.append(-distances)
        chosen = distances.argmin(dim=1)
        ways = {
            "module": lambda: self.book(chosen.view(-1, 1)).squeeze(1),
            "function": lambda: F.embedding(chosen, self.codes),
            "brackets": lambda: self.codes[chosen],
            "detached": lambda: self.codes.detach()[chosen, :],
            "select": lambda: self.codes.index_select(0, chosen),
            "topk": lambda: self.codes[distances.topk(1, largest=False).indices[:, 0]],
            "stacked": lambda: self.codes[torch.stack([chosen, chosen])].mean(dim=0),
            "one-hot": lambda: F.one_hot(chosen, CODES).float() @ self.codes,
        }
        codes = ways[self.how]()
        return F.mse_loss(self.decoder(features + (codes - features).detach()), batch) + F.mse_loss(codes, features)


SEEN = ("module", "function", "brackets", "detached", "select", "topk")


def watched(model, **kwargs):
    keeper = PointKeeper()
    fit(model, [CollapseMonitor(every_n_steps=2, rows=64), keeper], **kwargs)
    return keeper


@pytest.mark.parametrize("how", SEEN)
def test_codes_are_drawn_however_they_are_looked_up(how):
    model = Quantizer(how)
    name = "book" if how == "module" else "table"
    keeper = watched(model, max_steps=4)
    # a window has a batch more than its rows need
    scores = [model.scores[:1], model.scores[:2], model.scores[1:4]]
    points, unused = (
        keeper.curve(f"collapse/{name}/assignment_perplexity"),
        keeper.curve(f"collapse/{name}/unused_codes"),
    )
    expected = [assignment_perplexity(torch.cat(of)).item() for of in scores]
    assert [point.value for point in points] == pytest.approx(expected)
    assert [(point.n, point.null) for point in points] == [(n, assignment_null(n, CODES)) for n in (32, 64, 96)]
    used = [len(torch.cat(of).argmax(dim=1).unique()) for of in scores]
    assert [point.value for point in unused] == pytest.approx([1 - of / CODES for of in used])
    assert [point.null for point in unused] == pytest.approx([(1 - 1 / CODES) ** n for n in (32, 64, 96)])


def test_indices_that_are_made_of_codes_are_codes():
    keeper = watched(Quantizer("stacked"), max_steps=2)
    point, _ = keeper.curve("collapse/table/assignment_perplexity")
    assert point.n == 64


def test_products_with_one_hot_rows_are_not_seen():
    assert not [point for point in watched(Quantizer("one-hot")).points if point.measure == "unused_codes"]


class Words(Toy):
    """Tokens and positions of the batch, and a table that is chosen from as ``how`` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.table, self.places = nn.Embedding(16, 16), nn.Embedding(16, 16)

    def training_step(self, batch, batch_idx):
        ids, rows = batch["ids"], batch["rows"]
        hidden = self.table(ids).mean(dim=1) + self.places(torch.arange(len(ids)))
        if self.how == "own guesses":  # as scheduled sampling does
            hidden = hidden + self.table((hidden @ self.table.weight.T).argmax(dim=1))
        if self.how == "search in the batch":
            hidden = hidden + self.places(rows.argmax(dim=1))
        if self.how == "labels":
            hidden = hidden + self.places.weight[ids[:, 0] + 1 - 1]
        return self.head(self.encoder(hidden)).square().mean()


@pytest.mark.parametrize("how", ["tokens", "own guesses", "search in the batch", "labels"])
def test_what_comes_of_the_batch_is_no_code(how):
    draw = torch.Generator().manual_seed(0)
    data = [
        {"ids": torch.randint(16, (8, 5), generator=draw), "rows": torch.randn(8, 16, generator=draw)} for _ in range(6)
    ]
    keeper = watched(Words(how), loader=DataLoader(data, batch_size=None))
    assert keeper.points
    assert not [point for point in keeper.points if point.measure in ("unused_codes", "assignment_perplexity")]


def test_one_hot_tokens_of_the_batch_are_no_codes():
    books, rows = Codebooks(nn.ParameterDict({"codes": torch.eye(8)})), torch.eye(8)
    books.given = {rows.untyped_storage().data_ptr()}
    books.armed = True
    books._root["codes"][rows.argmax(dim=1)]
    books.armed = False
    books.collect(0)
    assert books.read(0, CPU) == {}


def test_chosen_layers_bound_the_tables():
    for layers, drawn in ((["encoder"], False), (["book"], True)):
        keeper = PointKeeper()
        fit(Quantizer("module"), [CollapseMonitor(layers, every_n_steps=1), keeper], max_steps=2)
        assert bool(keeper.curve("collapse/book/unused_codes")) == drawn


def test_a_model_without_codes_is_left_alone_after_three_points():
    net = nn.ModuleDict({"table": nn.Embedding(8, 4)})
    books = Codebooks(net)
    for time in range(4):
        books.armed = True
        assert books.armed == (time < 3)
        net["table"](torch.arange(3))
        books.armed = False
        books.collect(time)
        assert books.read(0, CPU) == {}
    assert not books.open


def test_a_fused_layer_of_a_teacher_keeps_its_way():
    net = nn.ModuleDict({"book": nn.Embedding(8, 4), "teacher": nn.TransformerEncoderLayer(8, 2)})
    books = Codebooks(net)
    books.armed = True
    assert books.armed
    net["teacher"].eval()
    books.armed = True
    assert not books.armed


def test_compiled_models_are_not_listened_to():
    books = Codebooks(torch.compile(nn.Sequential(nn.Embedding(8, 4)), backend="eager"))
    books.armed = True
    assert not books.armed


@pytest.mark.parametrize("how", SEEN)
def test_watching_changes_nothing(how):
    trained = []
    for callbacks in ([], [CollapseMonitor(every_n_steps=1)]):
        torch.manual_seed(0)
        model = Quantizer(how)
        fit(model, callbacks)
        trained.append((weights(model), torch.random.get_rng_state()))
    assert all(torch.equal(trained[0][0][name], value) for name, value in trained[1][0].items())
    assert torch.equal(trained[0][1], trained[1][1])


def test_a_step_that_fails_leaves_no_mode_behind():
    class Fails(Quantizer):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fit(Fails(), [CollapseMonitor(every_n_steps=1)])
    assert torch.overrides._get_current_function_mode() is None


def test_what_is_resumed_goes_on_where_it_was():
    net = nn.ParameterDict({"codes": torch.eye(8), "others": torch.eye(8)})
    books = Codebooks(net)
    books.armed = True
    net["codes"][torch.cdist(torch.eye(8)[:3], net["codes"]).argmin(dim=1)]
    books.armed = False
    books.collect(0)
    books.read(0, CPU)
    fresh = Codebooks(net)
    fresh.load_state_dict(books.state_dict(), CPU)
    found = fresh.read(0, CPU)["codes"]
    assert torch.equal(found, books.read(0, CPU)["codes"])
    assert found.tolist() == pytest.approx([3.0, 3.0, 0.625])


def test_a_failure_of_ours_ends_no_step():
    class Odd(Quantizer):
        def training_step(self, batch, batch_idx):
            self.codes[torch.empty(0, 3).argmin(dim=1)]  # no row, and then one that is out of range
            return super().training_step(batch, batch_idx)

    keeper = watched(Odd("brackets"), max_steps=2)
    assert keeper.curve("collapse/table/unused_codes")


def test_a_codebook_of_one_code_is_a_failure_though_the_loss_falls():
    model, guard = Quantizer("brackets"), CollapseGuard(action="log")
    with torch.no_grad():
        model.table[1:] += 100  # too far to be the nearest of anything
    monitor = CollapseMonitor(every_n_steps=1, rows=32)
    fit(model, [monitor, guard], batches(60))
    [verdict] = [verdict for verdict in guard.judge.verdicts if verdict.kind == "prototype_collapse"]
    assert verdict.layer == "table"
    assert "92 % of the codes are chosen by none" in verdict.evidence
