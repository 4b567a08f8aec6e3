"""Sigma-reparametrization against its formula in double precision, and its power steps in real fits."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_collapse import QKClip, SigmaReparamUpdate
from lightning_collapse.functional import power_step, singular_vectors, spectral_estimate, spectral_reparam
from lightning_collapse.layers import ConversionError, SigmaReparam
from lightning_collapse.utilities.attention_projections import find_projections
from lightning_collapse.utilities.weight_matrices import weight_matrices
from tests.attention import Encoder, tokens
from tests.toys import QUIET, Toy, batches, fit


class Conv1D(nn.Module):
    """Hugging Face's linear layer, whose outputs are columns."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


KINDS = {
    "linear": (lambda: nn.Linear(5, 3), (2, 5)),
    "convolution": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "convolution of images": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "Conv1D": (lambda: Conv1D(6, 4), (2, 3, 4)),
}


def exact(weight):
    return torch.linalg.svdvals(weight.detach().flatten(1).double())[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["identity", "unit"])
def test_weight_in_effect(kind, init):
    make, shape = KINDS[kind]
    layer, rows = make(), torch.randn(shape)
    before, weight = layer(rows).detach(), layer.weight.detach().clone()
    SigmaReparam.convert_(layer, init=init)
    assert layer.gamma.shape == (1,)
    norm = exact(weight) if init == "identity" else torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(layer.gamma.detach()[0].double(), norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(exact(layer.weight), norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.weight.double(), norm / exact(weight) * weight.double(), rtol=1e-6, atol=1e-7)
    if init == "identity":
        torch.testing.assert_close(layer(rows), before, rtol=0, atol=1e-6 * float(before.abs().max()))
    assert torch.equal(layer.raw, weight)


def test_gradient_is_that_of_the_formula_and_orthogonal_to_the_weight():
    """For any vectors, by Euler's theorem: the weight in effect is homogeneous of degree 0."""
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    left, right = (nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in (6, 4))
    for u, v in [(left, right), singular_vectors(weight)]:
        assert torch.autograd.gradcheck(lambda w, g, u=u, v=v: spectral_reparam(w, g, u, v), (weight, gain))
        (gradient,) = torch.autograd.grad(spectral_reparam(weight, gain, u, v).sin().sum(), weight)
        assert (gradient * weight).sum().abs() < 1e-12 * gradient.norm() * weight.norm()


def test_singular_vectors_and_power_steps():
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    u, v = singular_vectors(weight)
    torch.testing.assert_close(spectral_estimate(weight, u, v).double(), exact(weight), rtol=1e-6, atol=0)
    assert all(map(torch.equal, power_step(torch.full_like(weight, torch.nan), u, v), (u, v)))
    cold = nn.functional.normalize(torch.ones(48), dim=0), nn.functional.normalize(torch.ones(32), dim=0)
    for _ in range(200):
        cold = power_step(weight, *cold)
    torch.testing.assert_close(spectral_estimate(weight, *cold).double(), exact(weight), rtol=1e-4, atol=0)


def test_one_step_per_update_follows_adam():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    nn.init.normal_(layer.weight)  # weights that a step changes little: see the page for others
    SigmaReparam.convert_(layer)
    optimizer, target = torch.optim.Adam(layer.parameters(), lr=1e-3), torch.randn(64, 64)
    for step in range(100):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
        SigmaReparam.update_(layer)
        if step % 10 == 0:
            found = spectral_estimate(layer.raw.detach(), layer.u, layer.v)
            torch.testing.assert_close(found.double(), exact(layer.raw), rtol=0.01, atol=0)
    with torch.no_grad():
        layer.raw.copy_(target)
    SigmaReparam.update_(layer, exact=True)
    torch.testing.assert_close(exact(layer.weight).float(), layer.gamma.detach()[0], rtol=1e-6, atol=0)


def toy(**options):
    torch.manual_seed(0)
    model = Toy(**options)
    SigmaReparam.convert_(model)
    return model


class Counter(SigmaReparamUpdate):
    """Notes the left vector of the first layer after every batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(pl_module.encoder[0].u.clone())

    @property
    def moves(self):
        return [not torch.equal(a, b) for a, b in zip(self.seen, self.seen[1:], strict=False)]


def test_a_fit_is_the_loop_by_hand():
    fitted, by_hand = toy(), toy()
    fit(fitted, [SigmaReparamUpdate()])
    optimizer = by_hand.configure_optimizers()
    for batch in batches():
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
        SigmaReparam.update_(by_hand)
    state = fitted.state_dict()
    assert all(torch.equal(state[key], value) for key, value in by_hand.state_dict().items())
    assert not torch.equal(state["head.u"], toy().head.u)


def test_one_step_per_accumulation_window():
    counter = Counter()
    fit(toy(), [counter], accumulate_grad_batches=2)
    assert counter.moves == [True, False, True, False, True]


class Overflows(Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.batch_idx == 3:
            pl_module.head.gamma.grad.fill_(torch.inf)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_no_step_for_an_update_that_the_scaler_leaves_out():
    counter, scaler = Counter(), torch.amp.GradScaler("cpu", init_scale=1.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(toy(), [counter, Overflows()], plugins=[plugin])
    assert counter.moves == [True, True, False, True, True]


class TwoOptimizers(Toy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.encoder, self.head)]


def test_only_what_an_optimizer_has_stepped_moves():
    model, counter = TwoOptimizers(), Counter()
    SigmaReparam.convert_(model)
    fit(model, [counter])
    assert counter.moves == [False, True, False, True, False]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_resumed_fits_go_on_as_if_uninterrupted(tmp_path):
    whole = toy()
    fit(whole, [SigmaReparamUpdate()], max_epochs=2)
    trainer = fit(toy(), [SigmaReparamUpdate()])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = toy()
    options = {**QUIET, "max_epochs": 2, "logger": False, "callbacks": [SigmaReparamUpdate()]}
    Trainer(**options).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_states_of_other_weights():
    """A plain state keeps its function; vectors that do not belong to the weight are refused."""
    plain, model, rows = Toy(), toy(), torch.randn(4, 16)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model.encoder(rows), plain.encoder(rows), rtol=0, atol=1e-6)
    state = toy().state_dict()
    state["head.weight"] = -state["head.weight"]
    with pytest.raises(RuntimeError, match=r"`head.u` and `head.v` do not belong to `head.weight`"):
        model.load_state_dict(state)
    del state["head.u"], state["head.v"]
    model.load_state_dict(state)
    torch.testing.assert_close(exact(model.head.weight).float(), state["head.gamma"][0], rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder.0.weight"):
        model.load_state_dict({})


def test_vectors_stay_in_single_precision():
    model = toy().bfloat16()
    assert model.head.u.dtype == model.head.v.dtype == torch.float32
    assert model.head.gamma.dtype == model.head.weight.dtype == torch.bfloat16


def test_one_graph_while_the_vectors_move():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    SigmaReparam.convert_(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        rows = torch.randn(8, 4)
        loss = compiled(rows).square().mean()
        torch.testing.assert_close(loss, model(rows).square().mean(), rtol=0, atol=0)
        loss.backward()
        optimizer.step()
        SigmaReparam.update_(model)
    assert len(graphs) == 1


def test_who_reads_weights_reads_those_in_effect():
    model = Encoder(dropout=0.0)
    SigmaReparam.convert_(model, include=["encoder"])
    with torch.no_grad():
        model.encoder.layers[0].linear1.gamma.fill_(3.0)
    found = {matrix.name: matrix.read() for matrix in weight_matrices(model)}
    torch.testing.assert_close(exact(found["encoder.layers.0.linear1"]).float(), torch.tensor(3.0), rtol=1e-6, atol=0)
    assert all("computed from others" in projections.reason for projections in find_projections(model))
    with pytest.raises(MisconfigurationException, match="its weights are computed from others"):
        fit(model, [QKClip()], tokens(1))


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda model: nn.init.zeros_(model.head.weight), "`head`: its `weight` is 0, or not finite"),
        (lambda model: nn.init.constant_(model.head.weight, torch.nan), "`head`: its `weight` is 0, or not finite"),
        (lambda model: setattr(model, "head", nn.LazyLinear(2)), "`head`: its `weight` is lazy"),
        (lambda model: setattr(model, "head", nn.MultiheadAttention(8, 2, kdim=4)), "`head`: it has no parameter `in_"),
        (lambda model: model.head.register_buffer("u", torch.ones(1)), "`head`: it has a `u` of its own"),
    ],
)
def test_refusals(break_it, match):
    model = Toy()
    with torch.no_grad():
        break_it(model)
    with pytest.raises(ConversionError, match=match):
        SigmaReparam.convert_(model)
    assert not any(isinstance(module, SigmaReparam) for module in model.modules())


def test_tied_weights_are_refused_and_shared_modules_are_converted_once():
    tied = Encoder(dropout=0.0)
    tied.head.weight = tied.embed.weight
    with pytest.raises(ConversionError, match=r"`head`: its `weight` is that of `embed` too.*\n.*exclude=\['head'\]"):
        SigmaReparam.convert_(tied)
    layer = nn.Linear(4, 4)
    shared, rows = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 4)
    before = shared(rows).detach()
    assert SigmaReparam.convert_(shared) == ["0"]
    torch.testing.assert_close(shared(rows), before, rtol=0, atol=1e-6)
    assert SigmaReparam.revert_(shared) == ["0"]
    torch.testing.assert_close(shared(rows), before, rtol=0, atol=1e-6)
    SigmaReparam.convert_(model := nn.ModuleList([nn.Linear(4, 4), nn.Embedding(4, 4)]))
    model[1].weight = model[0].raw
    with pytest.raises(ConversionError, match="`0`: its `weight` is that of `1` too"):
        SigmaReparam.revert_(model)


def test_the_callback_wants_layers_and_leaves_nothing():
    with pytest.raises(MisconfigurationException, match="`SigmaReparamUpdate` finds no layer to follow in Toy"):
        fit(Toy(), [SigmaReparamUpdate()])
    callback = SigmaReparamUpdate()
    trainer = fit(toy(), [callback])
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not callback._weights
    with pytest.raises(ValueError, match="`init` must be one of"):
        SigmaReparam.convert_(Toy(), init="zero")
    with pytest.raises(ValueError, match=r"`include` takes a list of names.*`include=\['head'\]`"):
        SigmaReparam.convert_(Toy(), include="head")
    with pytest.raises(ValueError, match="'tail' matches no submodule"):
        SigmaReparam.convert_(Toy(), exclude=["tail"])
