"""Quantizers choose the nearest codes in any precision, train what they should, and keep codes alive by a rule."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from lightning_collapse.functional import vector_quantization
from lightning_collapse.functional.assignment import perplexity
from lightning_collapse.layers import ConversionError, EMAVectorQuantizer, SimVQ, VectorQuantizer
from lightning_collapse.monitoring.codebooks import Codebooks
from tests.toys import QUIET, Toy, batches

CODES, WIDTH, ROWS = 24, 6, 40


def made(kind, **options):
    torch.manual_seed(0)
    quantizer = kind(CODES, WIDTH, **options)
    nn.init.normal_(quantizer.codebook.weight)
    return quantizer


def rows(seed=1, count=ROWS):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "gradient": lambda: made(VectorQuantizer),
    "rotation": lambda: made(VectorQuantizer, estimator="rotation"),
    "ema": lambda: made(EMAVectorQuantizer, restart=True),
    "simvq": lambda: SimVQ.convert_(quantizer := made(VectorQuantizer), init="published") and quantizer,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@every_kind
def test_codes_are_the_nearest_and_what_a_decoder_looks_up(kind):
    quantizer, features = KINDS[kind](), rows().unflatten(0, (8, 5)).requires_grad_()
    quantized, indices, loss = quantizer(features)
    table = quantizer.codebook.weight.detach().double()
    distances = (features.detach().double().unsqueeze(-2) - table).square().sum(dim=-1)
    assert torch.equal(indices, distances.argmin(dim=-1))
    assert torch.equal(quantized, quantizer.get_codebook_entry(indices))
    beta, alpha = 0.25, 0.0 if kind == "ema" else 1.0
    chosen = table[indices]
    torch.testing.assert_close(loss.double(), (beta + alpha) * mse_loss(chosen, features.double()), atol=0, rtol=1e-5)
    (slopes,) = torch.autograd.grad(quantized.square().sum(), features, retain_graph=True)
    lengths = [tensor.detach().norm(dim=-1) for tensor in (slopes, 2 * quantized, features)]
    torch.testing.assert_close(lengths[0], lengths[1] * (lengths[1] / 2 / lengths[2] if kind == "rotation" else 1))
    assert kind == "rotation" or torch.equal(slopes, 2 * quantized)
    (gradient,) = torch.autograd.grad(loss, features)
    exact = 2 * beta * (features.detach().double() - chosen) / features.numel()
    torch.testing.assert_close(gradient.double(), exact, atol=1e-7, rtol=1e-5)


@every_kind
def test_half_precision_chooses_as_single_precision_does(kind):
    quantizer, features = KINDS[kind]().eval(), rows()
    rounded = features.bfloat16()
    expected = quantizer(rounded.float())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = quantizer(rounded)
        assert torch.equal(found.indices, expected.indices)
        assert found.quantized.dtype == torch.bfloat16
        assert found.loss.dtype == torch.float32
        torch.testing.assert_close(found.loss, expected.loss)
    half = quantizer.bfloat16()(rounded)
    assert half.quantized.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for name, buffer in half_states(quantizer).items())


def half_states(quantizer):
    return {name: getattr(quantizer, name) for name in ("counts", "sums") if hasattr(quantizer, name)}


def test_far_from_the_origin_and_in_tiles(monkeypatch):
    """What all codes have in common cancels before it is rounded, and tiles change nothing."""
    quantizer, features = made(VectorQuantizer), (64 * rows()).round() / 64
    with torch.no_grad():
        quantizer.codebook.weight.copy_((64 * quantizer.codebook.weight).round() / 64)
        expected = quantizer(features).indices
        quantizer.codebook.weight += 1024  # exact, since all numbers are multiples of 1/64
    assert torch.equal(quantizer(features + 1024).indices, expected)
    monkeypatch.setattr(vector_quantization, "TILE_ELEMENTS", 3 * CODES)
    assert torch.equal(quantizer(features + 1024).indices, expected)


@every_kind
def test_a_step_moves_what_it_should(kind):
    quantizer = KINDS[kind]()
    before = quantizer.codebook.weight.detach().clone()
    trained = list(quantizer.parameters())
    optimizer = torch.optim.SGD([p for p in trained if p.requires_grad] or [torch.zeros(1, requires_grad=True)], lr=0.1)
    _, indices, loss = quantizer(rows())
    if kind != "ema":
        loss.backward()
        optimizer.step()
    else:
        quantizer(rows())
    moved = (quantizer.codebook.weight != before).any(dim=1)
    hit = torch.zeros(CODES, dtype=torch.bool).index_fill_(0, indices, True)
    assert not hit.all()
    assert moved.all() if kind == "simvq" else torch.equal(moved[hit], hit[hit])
    assert kind in ("simvq", "ema") or not moved[~hit].any()
    assert kind != "ema" or torch.allclose(quantizer.codebook.weight[~hit], before[~hit], rtol=1e-3)


@pytest.mark.parametrize("kind", ["rotation", "ema"])
def test_one_graph(kind):
    torch._dynamo.reset()
    plain, features = KINDS[kind](), rows()
    quantizer = copy.deepcopy(plain)
    compiled = torch.compile(quantizer, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(tuple(compiled(features)), tuple(plain(features)))
    assert same_state(quantizer, plain)


@every_kind
def test_copies_pickles_and_resumed_runs_go_on_alike(kind):
    quantizer = KINDS[kind]()
    for seed in range(3):
        quantizer(rows(seed))
    resumed = KINDS[kind]()
    resumed.load_state_dict(quantizer.state_dict())
    others = [copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), resumed]
    for seed in range(3, 6):
        expected = quantizer(rows(seed))
        assert all(torch.equal(other(rows(seed)).quantized, expected.quantized) for other in others)
    assert all(same_state(other, quantizer) for other in others)


@every_kind
def test_no_row_and_rows_that_are_not_finite(kind):
    quantizer = KINDS[kind]()
    before = copy.deepcopy(quantizer)
    quantized, indices, loss = quantizer(torch.empty(0, 3, WIDTH))
    assert quantized.shape == (0, 3, WIDTH)
    assert indices.shape == (0, 3)
    assert loss == 0
    bad = rows()
    bad[::2, 0] = float("nan")
    quantizer(bad)
    before(bad[1::2])
    assert same_state(quantizer, before)
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`codes` must be an integer of at least 2, got 1"):
        VectorQuantizer(1, 4)
    with pytest.raises(ValueError, match="`dim` must be an integer of at least 1, got 0"):
        VectorQuantizer(4, 0)
    with pytest.raises(ValueError, match="`estimator` must be one of"):
        VectorQuantizer(4, 4, estimator="gumbel")
    with pytest.raises(ValueError, match="`commitment` must not be negative"):
        VectorQuantizer(4, 4, commitment=-1.0)
    with pytest.raises(ValueError, match=r"`decay` must be from 0 to below 1, got 1\.0"):
        EMAVectorQuantizer(4, 4, decay=1.0)
    for features in (torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.long), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"floating point of shape \(\.\.\., 4\).*channels of maps last"):
            VectorQuantizer(4, 4)(features)


def test_running_means_are_those_of_a_loop_in_float64():
    quantizer = made(EMAVectorQuantizer, decay=0.9)
    codes = quantizer.codebook.weight.double()
    mean = ROWS / CODES
    counts, sums = torch.full((CODES,), mean, dtype=torch.float64), mean * codes
    for seed in range(4):
        features, total = rows(seed).double(), counts.sum()
        chosen = quantizer(rows(seed)).indices
        assert torch.equal(chosen, (features.unsqueeze(1) - codes).square().sum(dim=2).argmin(dim=1))
        counts, sums = counts * 0.9, sums * 0.9
        for row, code in zip(features, chosen, strict=True):
            counts[code] += 0.1
            sums[code] += 0.1 * row
        total = counts.sum()
        codes = sums / ((counts + 1e-5) / (total + CODES * 1e-5) * total).unsqueeze(1)
    torch.testing.assert_close(quantizer.counts.double(), counts, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.sums.double(), sums, rtol=1e-5, atol=1e-5)
    quantizer(rows())
    torch.testing.assert_close(quantizer.codebook.weight.double(), codes, rtol=1e-4, atol=1e-5)
    state = copy.deepcopy(quantizer)
    quantizer.eval()(rows())
    assert same_state(quantizer, state)


def test_codes_in_use_do_not_expire():
    """A sixteenth of a row per code and step, as of 65,536 codes and 4096 rows: a threshold of 2 expires all."""
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(256, 4, decay=0.994, restart=True)
    codes = quantizer.codebook.weight.clone()
    for _ in range(500):
        quantizer(codes[torch.randint(256, (16,))])
    assert not quantizer.restarts.any()
    assert (quantizer.counts < 2).all()


def test_one_step_replaces_dead_codes_by_rows_of_their_own_and_gives_them_time():
    quantizer = made(EMAVectorQuantizer, decay=0.5, restart=True)
    features = rows(count=480)
    quantizer(features)
    quantizer.counts[:5] = 0.0  # with 20 rows a code the threshold is 2, and the decay its own
    quantizer.codebook.weight[:5] = 1e3
    quantizer.sums[:5] = 0.0
    before = quantizer.restarts.clone()
    quantizer._update(features, torch.full((480,), 7))
    replaced = (quantizer.restarts - before).bool()
    assert replaced[:5].all()
    assert torch.equal(quantizer.counts[:5], torch.full((5,), 20.0))
    fresh = quantizer.sums[:5] / 20
    # by differences: products round by more than that
    distance, which = torch.cdist(fresh, features, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    assert distance.max() < 1e-5
    assert len(which.unique()) == 5


def test_recomputation_finds_the_codes_that_it_had_and_changes_nothing():
    features, states, gradients = rows(), [], []
    for use in (None, True, False):
        quantizer = made(EMAVectorQuantizer, restart=True)
        inputs = features.clone().requires_grad_()
        for _ in range(3):
            out = quantizer(inputs * 1) if use is None else checkpoint(quantizer, inputs * 1, use_reentrant=use)
            (out[0].square().sum() + out[2]).backward()
        states.append(quantizer)
        gradients.append(inputs.grad)
    assert states[0].updates == 3
    assert all(same_state(states[0], state) for state in states[1:])
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients[1:])


def test_simvq_of_others_tables_and_what_is_refused():
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(CODES, WIDTH)
            self.other = nn.Linear(WIDTH, WIDTH)

        def forward(self, features):
            indices = torch.cdist(features, self.embedding.weight).argmin(dim=-1)
            return self.embedding(indices)

    theirs = Theirs()
    before = theirs(rows())
    with pytest.raises(ValueError, match="finds nothing to convert"):
        SimVQ.convert_(theirs)
    with pytest.raises(ConversionError, match="`other`: it is a `Linear`, and no table"):
        SimVQ.convert_(theirs, codebooks=["*"])
    assert SimVQ.convert_(theirs, codebooks=["embedding"]) == ["embedding"]
    assert torch.equal(theirs(rows()), before)
    theirs(rows()).sum().backward()
    assert theirs.embedding.raw.grad is None
    assert theirs.embedding.projection.grad.any()
    SimVQ.revert_(theirs)
    assert theirs.embedding.weight.requires_grad
    with pytest.raises(ConversionError, match="`codebook`: no gradient trains its codes: they are running means"):
        SimVQ.convert_(made(EMAVectorQuantizer))
    with pytest.raises(ConversionError, match="max_norm"):
        SimVQ.convert_(nn.ModuleList([nn.Embedding(4, 2, max_norm=1.0)]), codebooks=["0"])


@every_kind
def test_monitors_know_the_codebook(kind):
    net = nn.ModuleDict({"quantizer": KINDS[kind]()})
    books = Codebooks(net)
    books.armed = True
    indices = net["quantizer"](rows() * 1).indices
    books.armed = False
    books.collect(0)
    used, n, unused = books.read(0, torch.device("cpu"))["quantizer.codebook"].tolist()
    counts = torch.bincount(indices, minlength=CODES).double()
    assert (used, n, unused) == pytest.approx((perplexity(counts).item(), ROWS, (counts == 0).double().mean().item()))


class Learner(Toy):
    """Rows go through codes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quantizer = EMAVectorQuantizer(CODES, 8, decay=0.5, restart=True)

    def training_step(self, batch, batch_idx):
        quantized, _, loss = self.quantizer(self.encoder(batch))
        return self.head(quantized).square().mean() + loss


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    def fit(epochs, **options):
        torch.manual_seed(0)
        model, trainer = Learner(), Trainer(**QUIET | {"max_epochs": epochs, "logger": False})
        trainer.fit(model, batches(), **options)
        return model, trainer

    whole, _ = fit(2)
    fit(1)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, ckpt_path=tmp_path / "half.ckpt")
    assert whole.quantizer.updates == 2 * len(batches())
    assert same_state(resumed, whole)
