"""What ``QKClip`` scales, by how much, and what it refuses, through a real ``Trainer``."""

import math
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_collapse import AttentionEntropyMonitor, AttentionLogitMonitor, QKClip
from lightning_collapse.functional import logit_extremes
from tests.attention import GPT
from tests.attention import tokens as token_batches
from tests.toys import QUIET, MemoryLogger, PointKeeper, weights

WIDTH, HEADS, LENGTH = 24, 6, 10
E = WIDTH // HEADS


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Fused(nn.Module):
    """One projection of all three, as in timm."""

    def __init__(self, kv_heads=HEADS):
        super().__init__()
        self.kv_heads = kv_heads
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * kv_heads * E)

    def project(self, x):
        sizes = [WIDTH, self.kv_heads * E, self.kv_heads * E]
        q, k, v = self.qkv(x).split(sizes, dim=-1)
        return split(q, HEADS), split(k, self.kv_heads), split(v, self.kv_heads)

    def forward(self, x):
        q, k, v = self.project(x)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


class Separate(Fused):
    """Projections of their own, and a rotation before the product."""

    def __init__(self, kv_heads=HEADS, rotated=False):
        super().__init__(kv_heads)
        del self.qkv
        self.rotated = rotated
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, kv_heads * E), nn.Linear(WIDTH, kv_heads * E)

    def project(self, x):
        q, k, v = (
            split(self.q_proj(x), HEADS),
            split(self.k_proj(x), self.kv_heads),
            split(self.v_proj(x), self.kv_heads),
        )
        return (q, k, v) if not self.rotated else (rotate(q), rotate(k), v)


def rotate(x):
    angle = torch.arange(x.shape[2], dtype=x.dtype).unsqueeze(1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Torch(nn.Module):
    """Torch's own."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.mask = nn.Transformer.generate_square_subsequent_mask(LENGTH).bool()

    def forward(self, x):
        return self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]

    def project(self, x):
        attention = self.attention
        if attention.in_proj_weight is not None:
            both = attention.in_proj_weight.chunk(3)[:2]
        else:
            both = attention.q_proj_weight, attention.k_proj_weight
        biases = attention.in_proj_bias.chunk(3)[:2]
        return [split(F.linear(x, w, b), HEADS) for w, b in zip(both, biases, strict=True)]


class Conv1D(nn.Module):
    """Hugging Face's: outputs are columns."""

    def __init__(self):
        super().__init__()
        self.nf = 3 * WIDTH
        self.weight = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.zeros(3 * WIDTH))

    def forward(self, x):
        return x @ self.weight + self.bias


class Gpt2(Fused):
    def __init__(self):
        super().__init__()
        del self.qkv
        self.c_attn = Conv1D()

    def project(self, x):
        return [split(part, HEADS) for part in self.c_attn(x).chunk(3, dim=-1)]


FORMS = {
    "fused": Fused,
    "fused, grouped": lambda: Fused(kv_heads=2),
    "separate": Separate,
    "separate, grouped": lambda: Separate(kv_heads=3),
    "separate, rotated": lambda: Separate(rotated=True),
    "multi-query": lambda: Separate(kv_heads=1),
    "torch": Torch,
    "torch, widths": lambda: Torch(kdim=WIDTH, vdim=WIDTH),
    "columns": Gpt2,
}


class Lit(LightningModule):
    """Two layers, whose heads have logits of very different size."""

    def __init__(self, make, rate=0.0):
        super().__init__()
        self.rate = rate
        self.layers = nn.ModuleList([make(), make()])
        with torch.no_grad():
            for layer in self.layers:
                for name, parameter in layer.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_()
                    parameter.mul_(torch.linspace(0.5, 4, parameter.shape[0]).view(-1, *[1] * (parameter.ndim - 1)))

    def training_step(self, batch, batch_idx):
        x = batch
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    @torch.no_grad()
    def largest(self, x, index=0):
        """Largest logit of every head of a layer, and of the first layer by default."""
        for layer in self.layers[:index]:
            x = x + layer(x)
        q, k, *_ = self.layers[index].project(x)
        return logit_extremes(q, k, is_causal=True).highest


def data(n=1, size=4):
    return DataLoader(torch.randn(n * size, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).double(), size)


def run(model, *callbacks, loader=None, **kwargs):
    options = {**QUIET, "max_epochs": 1, "logger": MemoryLogger(), "log_every_n_steps": 1, "precision": "64-true"}
    trainer = Trainer(**{**options, **kwargs}, callbacks=list(callbacks))
    trainer.fit(model, data() if loader is None else loader)
    return trainer


def lit(form, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Lit(FORMS[form], **kwargs).double()


def by_head(layer):
    """Weights and biases of queries and of keys, each with the heads first."""
    named = dict(layer.named_parameters())
    if "qkv.weight" in named:
        sizes = [WIDTH, layer.kv_heads * E, layer.kv_heads * E]
        made = [named["qkv.weight"].split(sizes)[:2], named["qkv.bias"].split(sizes)[:2]]
    elif "q_proj.weight" in named:
        made = [[named[f"{part}_proj.{kind}"] for part in "qk"] for kind in ("weight", "bias")]
    elif "c_attn.weight" in named:
        made = [named["c_attn.weight"].mT.chunk(3)[:2], named["c_attn.bias"].chunk(3)[:2]]
    else:
        weights = [named.get(f"attention.{part}_proj_weight") for part in "qk"]
        if weights[0] is None:
            weights = named["attention.in_proj_weight"].chunk(3)[:2]
        made = [weights, named["attention.in_proj_bias"].chunk(3)[:2]]
    return [part.detach().unflatten(0, (-1, E)) for parts in made for part in parts]


def groups(form):
    return {"fused, grouped": 3, "separate, grouped": 2, "multi-query": 6}.get(form, 1)


@pytest.mark.parametrize("alpha", [0.5, 0.2, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_the_new_maximum_is_the_bound_and_heads_below_it_keep_every_bit(form, alpha):
    model = lit(form)
    batch = next(iter(data()))
    before = model.largest(batch)
    of_groups = before.view(-1, groups(form)).amax(dim=1)
    tau = float(of_groups.sort().values[len(of_groups) // 2 - 1 : len(of_groups) // 2 + 1].mean())
    tau = tau if len(of_groups) > 1 else float(before.max()) / 3
    before_rows = [x.clone() for x in model.layers[0].project(batch)[:2]]
    old = {name: value.clone() for name, value in model.state_dict().items()}
    old_heads = [x.clone() for x in by_head(model.layers[0])]
    run(model, QKClip(tau=tau, alpha=alpha, layers=["layers.0*"]))
    factor = torch.where(of_groups > tau, tau / of_groups, 1.0)
    expected = before * factor.repeat_interleave(groups(form))
    torch.testing.assert_close(model.largest(batch), expected, rtol=1e-12, atol=0)
    assert model.largest(batch).max().item() == pytest.approx(tau, rel=1e-12)
    query, key = model.layers[0].project(batch)[:2]
    for rows, was, power in ((query, before_rows[0], alpha), (key, before_rows[1], 1 - alpha)):
        of_heads = factor.repeat_interleave(rows.shape[1] // len(factor)) ** power
        torch.testing.assert_close(rows, was * of_heads.view(1, -1, 1, 1), rtol=1e-11, atol=1e-12)
    below = of_groups <= tau
    assert below.any() == (len(below) > 1)
    for now, was in zip(by_head(model.layers[0]), old_heads, strict=True):
        of_heads = below.repeat_interleave(len(now) // len(below))
        assert torch.equal(now[of_heads], was[of_heads])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    assert changed
    assert all(name.startswith("layers.0.") for name in changed)


def test_a_bound_that_nothing_exceeds_changes_no_bit():
    model, twin = lit("fused", rate=0.01), lit("fused", rate=0.01)
    run(model, QKClip(tau=1e6), loader=data(5))
    run(twin, loader=data(5))
    assert all(torch.equal(value, weights(twin)[name]) for name, value in weights(model).items())


def test_log_only_measures_and_scales_nothing():
    model, twin, keeper = lit("fused", rate=0.01), lit("fused", rate=0.01), PointKeeper()
    first = model.largest(next(iter(data(3)))).max().item()
    run(model, QKClip(tau=1.0, log_only=True), keeper, loader=data(3))
    run(twin, loader=data(3))
    assert all(torch.equal(value, weights(twin)[name]) for name, value in weights(model).items())
    assert keeper.curve("qk_clip/layers.0/max_logit")[0].value == pytest.approx(first, rel=1e-12)
    assert keeper.curve("qk_clip/layers.0/over_tau")[0].value == pytest.approx(first, rel=1e-12)
    assert {point.value for point in keeper.curve("qk_clip/layers.0/clipped_share")} == {0.0}


def test_curves_are_of_all_steps_since_the_last_point():
    keeper, every = PointKeeper(), PointKeeper()
    model, twin = lit("fused", rate=1e-3), lit("fused", rate=1e-3)
    run(model, QKClip(tau=2.0), keeper, loader=data(6), log_every_n_steps=3)
    run(twin, QKClip(tau=2.0), every, loader=data(6))
    for name, join in (("max_logit", max), ("clipped_share", lambda values: sum(values) / 3)):
        values = [point.value for point in every.curve(f"qk_clip/layers.1/{name}")]
        found = [point.value for point in keeper.curve(f"qk_clip/layers.1/{name}")]
        assert found == pytest.approx([join(values[:3]), join(values[3:])], rel=1e-9)
    assert [point.step for point in keeper.curve("qk_clip/layers.1/max_logit")] == [2, 5]


def test_the_maximum_is_over_the_micro_batches_of_a_step():
    model, batches = lit("fused"), list(data(3))
    expected = torch.stack([model.largest(batch) for batch in batches]).amax(dim=0)
    tau = float(expected.min()) / 2
    run(model, QKClip(tau=tau, layers=["layers.0"]), loader=data(3), accumulate_grad_batches=3)
    found = torch.stack([model.largest(batch) for batch in batches]).amax(dim=0)
    torch.testing.assert_close(found, torch.full_like(found, tau), rtol=1e-12, atol=0)


def test_it_stays_below_the_bound_where_the_twin_does_not():
    class Growing(Lit):
        def training_step(self, batch, batch_idx):
            return -sum(self.layers[0].project(batch)[i].square().mean() for i in (0, 1)) + 0 * super().training_step(
                batch, batch_idx
            )

    largest = {}
    for name, callbacks in {"twin": [], "clipped": [QKClip(tau=20.0, layers=["layers.0"])]}.items():
        torch.manual_seed(0)
        model = Growing(Fused, rate=0.5).double()
        run(model, *callbacks, loader=data(30))
        largest[name] = model.largest(next(iter(data()))).max().item()
    assert largest["twin"] > 100
    assert largest["clipped"] < 40


def test_two_optimizers_stepped_by_hand_clip_what_they_own():
    class Manual(Lit):
        def __init__(self, make):
            super().__init__(make)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            (first if batch_idx % 2 else second).step()
            first.zero_grad()
            second.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in self.layers]

    torch.manual_seed(0)
    model = Manual(Fused).double()
    batch = next(iter(data()))
    before = weights(model)
    run(model, QKClip(tau=1.0), loader=data(1))  # the second one alone
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in changed} == {"1"}
    run(model, QKClip(tau=1.0), loader=data(2))
    assert model.largest(batch).max() < 2


def test_mixed_precision_scales_the_weights_in_single_precision():
    torch.manual_seed(0)
    model = Lit(Separate)
    loader = DataLoader(torch.randn(4, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)), 4)
    before = model.largest(next(iter(loader)))
    scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    for options in ({"precision": "bf16-mixed"}, {"precision": None, "plugins": [scaler]}):
        torch.manual_seed(0)
        model = Lit(Separate)
        run(model, QKClip(tau=1.0, layers=["layers.0"]), loader=loader, **options)
        assert model.layers[0].q_proj.weight.dtype == torch.float32
        found = model.largest(next(iter(loader)))
        expected = torch.where(before > 1, 1.0, before)
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.01)


def test_moments_stay_as_they_are():
    class Adam(Lit):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.0, weight_decay=0.0)

    states = []
    for callbacks in ([], [QKClip(tau=1.0)]):
        torch.manual_seed(0)
        model = Adam(Fused).double()
        trainer = run(model, *callbacks)
        states.append(trainer.optimizers[0].state_dict()["state"])
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


class Normed(Separate):
    def __init__(self):
        super().__init__()
        self.q_norm = nn.LayerNorm(E)


class Latent(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.kv_a_proj_with_mqa = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x):
        return self.q_proj(x)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        return self.query_key_value(x)[..., :WIDTH]


class Parametrized(Separate):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.q_proj)


REFUSED = {
    "q_norm` stands between": Normed,
    "multi-head latent attention": Latent,
    "order of heads in `query_key_value` is not known": Packed,
    "is computed from others": Parametrized,
    "finds no projections": lambda: nn.Linear(WIDTH, WIDTH),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_scaled_exactly_is_refused_at_the_start(reason):
    class Plain(Lit):
        def __init__(self, make):
            LightningModule.__init__(self)
            self.rate, self.layers = 0.0, nn.ModuleList([make()])

    with pytest.raises(MisconfigurationException, match=reason):
        run(Plain(REFUSED[reason]).double(), QKClip())


def test_weights_of_two_optimizers_or_of_two_layers_are_refused():
    class Split(Lit):
        def configure_optimizers(self):
            keys = [p for name, p in self.named_parameters() if "k_proj" in name]
            rest = [p for name, p in self.named_parameters() if "k_proj" not in name]
            return [torch.optim.SGD(some, lr=0.1) for some in (keys, rest)]

    model = Split(Separate).double()
    model.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"`layers.0`: one optimizer must train"):
        run(model, QKClip())
    model = lit("separate")
    model.layers[1].q_proj = model.layers[0].q_proj
    with pytest.raises(MisconfigurationException, match=r"`layers.1`: it shares a weight with `layers.0`"):
        run(model, QKClip())


class HiddenNorm(Fused):
    """Lengths are taken off in a way that no name tells."""

    def project(self, x):
        q, k, v = super().project(x)
        return F.normalize(q, dim=-1), k, v


class Interleaved(Fused):
    """Head by head: queries, keys, values."""

    def project(self, x):
        return self.qkv(x).unflatten(-1, (HEADS, 3, E)).permute(3, 0, 2, 1, 4)


class WrittenOut(Fused):
    def forward(self, x):
        q, k, v = self.project(x)
        return ((q @ k.mT / 2).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (HiddenNorm, "not what the projections return"),
        (Interleaved, "not what the projections return"),
        (WrittenOut, "writes its attention out"),
    ],
)
def test_what_shows_only_in_the_first_step_is_left_alone_and_said_once(kind, reason):
    torch.manual_seed(0)
    model = Lit(kind).double()
    before = weights(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(model, QKClip(tau=0.01), loader=data(3))
    told = [str(w.message) for w in said if "QKClip" in str(w.message)]
    assert len(told) == 2
    assert all(reason in message and f"`layers.{i}`" in message for i, message in enumerate(sorted(told)))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_frozen_layers_are_left_alone():
    model = lit("fused")
    model.layers[1].requires_grad_(False)
    model.configure_optimizers = lambda: torch.optim.SGD(model.layers[0].parameters(), lr=0.0)
    before = weights(model)
    run(model, QKClip(tau=0.5))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in changed} == {"0"}


def test_a_layer_is_clipped_from_when_it_is_trained():
    class Thaw(Callback):
        kept = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                self.kept = weights(pl_module.layers[1])
                pl_module.layers[1].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.layers[1].parameters())})

    model, thaw = lit("fused"), Thaw()
    model.layers[1].requires_grad_(False)
    model.configure_optimizers = lambda: torch.optim.SGD(model.layers[0].parameters(), lr=0.0)
    before = weights(model.layers[1])
    batches = data(3)
    run(model, thaw, QKClip(tau=0.5, layers=["layers.1"]), loader=batches)
    assert all(torch.equal(thaw.kept[name], value) for name, value in before.items())
    largest = model.largest(list(batches)[2], 1)
    assert largest.max() == pytest.approx(0.5, rel=1e-9)


def test_infinite_logits_scale_nothing():
    class Still(Lit):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return sum(parameter.sum() for parameter in self.parameters())

    torch.manual_seed(0)
    model = Still(Fused).double()
    before = weights(model)
    rows = torch.cat(list(data(2)))
    rows[4, 0] = math.inf
    keeper = PointKeeper()
    run(model, QKClip(tau=1e3, layers=["layers.0"]), keeper, loader=DataLoader(rows, 4))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert [point.step for point in keeper.curve("qk_clip/layers.0/max_logit")] == [0]


def test_nothing_is_left_behind_and_nothing_waits_for_the_device(monkeypatch):
    model, waits, on = lit("fused", rate=1e-3), [], []
    for way in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, way)

        def waiting(tensor, *args, original=original, way=way, **kwargs):
            if on and on[-1]:
                waits.append(way)
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, way, waiting)
    clip = QKClip(tau=1.0)
    after = clip._after_step

    def step(*args):
        on.append(bool(on))  # the first step looks once
        after(*args)
        on.append(False)

    monkeypatch.setattr(clip, "_after_step", step)
    trainer = run(model, clip, loader=data(4), log_every_n_steps=100)
    assert len(on) == 8
    assert waits == []
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not any(module._forward_hooks for module in model.modules())
    assert "training_step" not in vars(model)
    assert not torch.overrides.has_torch_function((torch.zeros(1),))


def test_gone_after_an_exception():
    class Failing(Lit):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("boom")

    model = Failing(Fused).double()
    with pytest.raises(RuntimeError, match="boom"):
        run(model, QKClip())
    assert not any(module._forward_hooks for module in model.modules())
    assert "training_step" not in vars(model)


def test_a_resumed_run_continues(tmp_path):
    def part(epochs, **kwargs):
        keeper, model = PointKeeper(), lit("fused", rate=1e-3)
        trainer = run(model, QKClip(tau=3.0), keeper, loader=data(5), max_epochs=epochs, log_every_n_steps=4, **kwargs)
        return keeper, model, trainer

    whole, model, _ = part(2)
    _, _, half = part(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert not any("qk" in key and "clip" in key for key in torch.load(tmp_path / "half.ckpt")["state_dict"])
    rest, resumed = PointKeeper(), lit("fused", seed=1, rate=1e-3)
    options = {**QUIET, "max_epochs": 2, "logger": MemoryLogger(), "log_every_n_steps": 4, "precision": "64-true"}
    trainer = Trainer(**options, callbacks=[QKClip(tau=3.0), rest])
    trainer.fit(resumed, data(5), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(resumed).items())
    found = {(point.key, point.step): point.value for point in rest.points}
    expected = {(p.key, p.step): p.value for p in whole.points if p.step > 4 and p.family == "qk_clip"}
    assert {key: value for key, value in found.items() if key[0].startswith("qk_clip")} == pytest.approx(expected)
    assert expected


def test_a_compiled_model_is_refused():
    model = GPT()
    model.blocks[0].compile(backend="eager")
    with pytest.raises(MisconfigurationException, match="compiled code hides its attention"):
        run(model, QKClip(), loader=token_batches(), precision="32-true")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tau": 0.0}, "`tau`"),
        ({"alpha": 1.5}, "`alpha` must be between 0 and 1, got 1.5"),
        ({"layers": "blocks"}, r"Write `layers=\['blocks'\]`"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        QKClip(**options)


def test_layers_that_are_not_there():
    with pytest.raises(MisconfigurationException, match=r"`QKClip\(layers=\['nothing'\]\)`: 'nothing' matches no"):
        run(lit("fused"), QKClip(layers=["nothing"]))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_whoever_else_reads_attention_is_not_taken_for_it(order):
    watchers = [AttentionLogitMonitor(every_n_steps=1), AttentionEntropyMonitor(every_n_steps=1), QKClip(log_only=True)]
    keeper, alone = PointKeeper(), PointKeeper()
    run(lit("separate"), *(watchers[i] for i in order), keeper, loader=data(2))
    run(lit("separate"), AttentionEntropyMonitor(every_n_steps=1), alone, loader=data(2))
    found = {(point.step, point.layer): point.value for point in keeper.points if point.measure == "entropy_mean"}
    rows = {(point.step, point.layer): point.n for point in keeper.points if point.measure == "entropy_mean"}
    assert found == {(p.step, p.layer): p.value for p in alone.points if p.measure == "entropy_mean"}
    assert rows == {(p.step, p.layer): p.n for p in alone.points if p.measure == "entropy_mean"}
    assert len(found) == 6  # of two layers and of all
