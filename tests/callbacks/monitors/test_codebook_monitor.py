"""``CodebookMonitor``: which codebooks are found, however they are written, and what is read of every step."""

import math
from collections import Counter

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_collapse import CodebookMonitor
from tests.toys import PointKeeper, fit, weights

K, D, SIZE = 12, 4, 10


class Plain(nn.Module):
    """As in the first tutorials: one-hot rows times the table, and no index is returned."""

    names = ("quantizer.table",)

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(K, D)

    def forward(self, z):
        flat = z.reshape(-1, D)
        distances = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.table.weight.T + self.table.weight.pow(2).sum(1)
        chosen = torch.argmin(distances, dim=1).unsqueeze(1)
        one_hot = torch.zeros(len(chosen), K).scatter_(1, chosen, 1)
        self.truth = [(chosen, flat.detach(), self.table.weight.detach().clone())]
        q = torch.matmul(one_hot, self.table.weight).view_as(z)
        return z + (q - z).detach(), (q - z.detach()).pow(2).mean()


class Returns(Plain):
    """As in taming-transformers and diffusers: maps, and indices deep in a tuple."""

    def forward(self, z):
        maps = z.view(len(z), -1, 1, D).permute(0, 3, 1, 2)
        flat = maps.permute(0, 2, 3, 1).reshape(-1, D)
        chosen = torch.cdist(flat, self.table.weight).argmin(dim=1)
        self.truth = [(chosen, flat.detach(), self.table.weight.detach().clone())]
        q = self.table(chosen).view_as(z)
        return z + (q - z).detach(), (q - z.detach()).pow(2).mean(), (None, None, chosen)


class Ema(nn.Module):
    """As in Encodec: a buffer of moving averages, and methods of their own that no hook hears."""

    names = ("quantizer.book.embed",)

    def __init__(self):
        super().__init__()
        self.book = EmaBook()

    def forward(self, z):
        flat = z.reshape(-1, D)
        chosen = self.book.quantize(flat)
        self.truth = [(chosen, flat.detach(), self.book.embed.clone())]
        q = self.book.decode(chosen).view_as(z)
        self.book.follow(flat.detach(), chosen)
        return z + (q - z).detach(), (q - z).pow(2).mean()


class EmaBook(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("embed", torch.randn(K, D))

    def quantize(self, rows):
        return (-torch.cdist(rows, self.embed)).max(dim=-1).indices

    def decode(self, chosen):
        return F.embedding(chosen, self.embed)

    @torch.no_grad()
    def follow(self, rows, chosen):
        one_hot = F.one_hot(chosen, K).type_as(rows)
        means = (one_hot.T @ rows) / one_hot.sum(0).clamp_min(1).unsqueeze(1)
        self.embed.lerp_(torch.where(one_hot.any(0).unsqueeze(1), means, self.embed), 0.2)


class Sim(nn.Module):
    """As in SimVQ: a frozen table behind a matrix."""

    names = ("quantizer",)

    def __init__(self):
        super().__init__()
        self.table, self.project = nn.Embedding(K, D), nn.Linear(D, D)
        self.table.requires_grad_(False)

    def forward(self, z):
        codes = self.project(self.table.weight)
        chosen = torch.cdist(z, codes.expand(len(z), K, D)).argmin(dim=-1)
        self.truth = [(chosen, z.detach().reshape(-1, D), codes.detach())]
        q = F.embedding(chosen, codes)
        return z + (q - z).detach(), (q - z.detach()).pow(2).mean(), chosen


class Levels(nn.Module):
    """Residual quantization in one method, over a list of tables."""

    names = ("quantizer.tables.0", "quantizer.tables.1")

    def __init__(self):
        super().__init__()
        self.tables = nn.ParameterList(torch.randn(K, D) * scale for scale in (1.0, 0.4))

    def forward(self, z):
        residual, whole, self.truth = z.reshape(-1, D), 0.0, []
        for table in self.tables:
            chosen = torch.cdist(residual, table).min(dim=-1)[1]
            self.truth.append((chosen, residual.detach(), table.detach().clone()))
            q = table[chosen]
            residual, whole = residual - q.detach(), whole + q
        return z + (whole.view_as(z) - z).detach(), (whole.view_as(z) - z.detach()).pow(2).mean()


KINDS = {"plain": Plain, "returns": Returns, "ema": Ema, "simvq": Sim, "levels": Levels}


class Net(LightningModule):
    """An autoencoder with classes as a condition, whose table is looked up by a search among the batch's numbers."""

    def __init__(self, quantizer):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = nn.Linear(6, 3 * D), quantizer, nn.Linear(3 * D, 6)
        self.classes, self.words = nn.Embedding(7, 3 * D), nn.Embedding(9, 3 * D)
        self.truth = []

    def training_step(self, batch, batch_idx):
        x, y, words = batch
        z = self.encoder(x) + self.classes(y.argmax(dim=1)) + self.words(words)
        z, loss, *_ = self.quantizer(z.view(len(x), 3, D))
        self.truth.append(self.quantizer.truth)
        guess = self.decoder(z.flatten(1)) @ self.words.weight[:, :6].T
        self.right = (guess.argmax(dim=1) == words).float().mean()  # a search along as many numbers as words
        return (self.decoder(z.flatten(1)) - x).pow(2).mean() + loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def data(steps=8):
    generator = torch.Generator().manual_seed(0)
    x, words = torch.randn(steps, SIZE, 6, generator=generator), torch.arange(steps * SIZE).view(steps, SIZE) % 9
    return DataLoader([(a, torch.eye(7)[w % 7], w) for a, w in zip(x, words, strict=True)], batch_size=None)


def watch(model, monitor, loader=None, **kwargs):
    keeper = PointKeeper()
    fit(model, [monitor, keeper], data() if loader is None else loader, **kwargs)
    return {(p.layer, p.measure, p.step): p.value for p in keeper.points}


@pytest.mark.parametrize("kind", KINDS)
def test_codebooks_are_found_and_every_step_counts(kind):
    torch.manual_seed(0)
    model = Net(KINDS[kind]())
    found = watch(model, CodebookMonitor(every_n_steps=4))
    assert {layer for layer, _, _ in found} == set(model.quantizer.names)
    for level, layer in enumerate(model.quantizer.names):
        for step, steps in ((0, [0]), (3, [1, 2, 3]), (7, [4, 5, 6, 7])):
            hits = Counter(int(k) for s in steps for k in model.truth[s][level][0].flatten())
            n = sum(hits.values())
            assert found[layer, "n", step] == n == 3 * SIZE * len(steps)
            assert found[layer, "usage", step] == pytest.approx(len(hits) / K)
            entropy = -sum(c / n * math.log(c / n) for c in hits.values())
            assert found[layer, "perplexity", step] == pytest.approx(math.exp(entropy), rel=1e-9)
            assert found[layer, "unseen_mass", step] == pytest.approx(sum(c == 1 for c in hits.values()) / n)
            chosen, rows, table = model.truth[step][level]
            rows, codes = rows.double(), table.double()[chosen.flatten()]
            spread = (rows - rows.mean(0)).pow(2).sum()
            error, scale = (rows - codes).pow(2).sum() / spread, (rows.pow(2).sum() / codes.pow(2).sum()).sqrt()
            assert found[layer, "quantization_error", step] == pytest.approx(error.item(), rel=1e-5)
            assert found[layer, "encoder_scale", step] == pytest.approx(scale.item(), rel=1e-5)
        assert found[layer, "motion", 7] > 0
        assert 0 <= found[layer, "churn", 7] <= 1
        assert (layer, "churn", 0) not in found


class Unselfish(Plain):
    """Its first argument has another name than most."""

    def forward(this, z):  # noqa: N805
        flat = z.reshape(-1, D)
        chosen = torch.cdist(flat, this.table.weight).argmin(dim=1).unsqueeze(1)
        one_hot = torch.zeros(len(chosen), K).scatter_(1, chosen, 1)
        this.truth = [(chosen, flat.detach(), this.table.weight.detach().clone())]
        q = (one_hot @ this.table.weight).view_as(z)
        return z + (q - z).detach(), (q - z.detach()).pow(2).mean()


@pytest.mark.parametrize("kind", [Plain, Unselfish])
def test_one_hot_rows_are_no_table_where_there_are_as_many_as_codes(kind):
    rows = [tuple(part[: K // 3] for part in batch) for batch in data(3)]
    found = watch(Net(kind()), CodebookMonitor(every_n_steps=1), DataLoader(rows, batch_size=None))
    assert {layer for layer, _, _ in found} == {"quantizer.table"}
    assert found["quantizer.table", "n", 2] == K


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_training_changes_and_nothing_stays(kind):
    def run(*callbacks):
        torch.manual_seed(0)
        model = Net(KINDS[kind]())
        fit(model, callbacks, data(5))
        return model, torch.random.get_rng_state()

    (plain, state), (watched, again) = run(), run(CodebookMonitor(every_n_steps=2))
    assert torch.equal(state, again)
    assert all(torch.equal(value, weights(watched)[key]) for key, value in weights(plain).items())
    for module in watched.modules():
        assert not {"forward", "quantize", "__getstate__", "__deepcopy__"} & set(vars(module))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision_and_accumulation(precision):
    torch.manual_seed(0)
    model = Net(Plain())
    loader = data()
    if precision == "64-true":
        model.quantizer = Returns()
        double = [[t.double() if t.is_floating_point() else t for t in batch] for batch in loader]
        loader = DataLoader(double, batch_size=None)
    found = watch(model, CodebookMonitor(every_n_steps=2), loader, precision=precision, accumulate_grad_batches=2)
    [layer] = model.quantizer.names
    assert [step for of, key, step in found if key == "n"] == [0, 1, 3]
    hits = torch.cat([model.truth[s][0][0].flatten() for s in (4, 5, 6, 7)])
    assert found[layer, "n", 3] == len(hits)
    assert found[layer, "usage", 3] == pytest.approx(len(hits.unique()) / K)


class Finite(nn.Module):
    """Finite scalar quantization: rounding without a table."""

    def forward(self, z):
        q = z.tanh().mul(2).round()
        levels = (q[..., :2] + 2).long()
        self.truth = [(levels[..., 0] * 5 + levels[..., 1], None, None)]
        return z + (q - z).detach(), z.new_zeros(()), self.truth[0][0]


def of_levels(module, args, output):
    return output[2], 25


def test_a_reader_says_what_was_chosen():
    model = Net(Finite())
    with pytest.warns(UserWarning, match=r"no codebook was found.*`CodebookMonitor\(layers="):
        assert watch(model, CodebookMonitor(every_n_steps=4)) == {}
    model = Net(Finite())
    found = watch(model, CodebookMonitor(["quantizer"], of_levels, every_n_steps=4))
    chosen = torch.cat([model.truth[s][0][0].flatten() for s in (4, 5, 6, 7)])
    assert found["quantizer", "usage", 7] == pytest.approx(len(chosen.unique()) / 25)
    assert ("quantizer", "motion", 7) not in found
    model = Net(Returns())
    own = watch(model, CodebookMonitor(["quantizer"], lambda m, a, o: (o[2][2], m.table.weight, a[0]), every_n_steps=4))
    model = Net(Returns())
    torch.manual_seed(0)
    assert own["quantizer", "quantization_error", 7] > 0
    assert own["quantizer", "motion", 7] > 0


@pytest.mark.filterwarnings("ignore:.*(did not run|was not used)")
@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda m, a, o: (o[2].float(), 25), "whole numbers, got torch.float32"),
        (lambda m, a, o: (o[2] + 20, 25), "were not 0 to 24"),
        (lambda m, a, o: o[2], "none is known"),
        (lambda m, a, o: 3, "a tensor of whole numbers, got int"),
    ],
)
def test_what_a_reader_gets_wrong_is_said_once_and_ends_nothing(read, said):
    model = Net(Finite())
    with pytest.warns(UserWarning, match=said) as warned:
        watch(model, CodebookMonitor(["quantizer"], read, every_n_steps=2))
    assert model.trainer.state.finished
    assert sum(said in str(w.message) for w in warned) == 1


@pytest.mark.filterwarnings("ignore:Total length of", "ignore:.*was not used before every point")
def test_an_empty_batch_and_one_code_end_nothing():
    model = Net(Plain())
    with torch.no_grad():
        model.quantizer.table.weight[1:] = 1e6
    some = list(data(2))
    empty = [[t[:0] for t in batch] for batch in some]
    loader = DataLoader([*some, *empty, *some], batch_size=None)
    found = watch(model, CodebookMonitor(every_n_steps=2), loader)
    [layer] = model.quantizer.names
    assert found[layer, "perplexity", 1] == 1.0


def test_resets_are_counted():
    class Restarts(Ema):
        def forward(self, z):
            self.steps = getattr(self, "steps", -1) + 1
            if self.steps == 6:
                self.book.embed[-2:] = z.detach().reshape(-1, D)[:2]
            return super().forward(z)

    model = Net(Restarts())
    model.quantizer.book.embed[-2:] = 30.0
    found = watch(model, CodebookMonitor(every_n_steps=4))
    assert [found["quantizer.book.embed", "resets", step] for step in (3, 7)] == [0, 2]


def test_arguments():
    with pytest.raises(ValueError, match=r"`read` takes a function.* layers=None"):
        CodebookMonitor(read=of_levels)
    with pytest.raises(ValueError, match=r"`read` takes a function"):
        CodebookMonitor(["quantizer"])
    with pytest.raises(MisconfigurationException, match="nothing"):
        fit(Net(Plain()), [CodebookMonitor(["nothing"], of_levels)], data(1))
