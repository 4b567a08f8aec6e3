"""What ``AttentionEntropyMonitor`` hears, draws and leaves alone, through a real ``Trainer``."""

import math
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos import Transformer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor
from lightning_collapse.callbacks.monitors.attention_entropy_monitor import Entropies
from lightning_collapse.functional import attention_entropy
from lightning_collapse.utilities import CURVES, Flag
from lightning_collapse.utilities.attention_calls import AttentionCall
from tests.attention import GPT, HEADS, LENGTH, WIDTH, WORDS, Attention, Encoder, read_qkv, tokens
from tests.toys import QUIET, MemoryLogger, PointKeeper, Toy, fit, weights

NAMES = ["entropy_mean", "entropy_min", "entropy_max", "collapsed_share", "overloaded_share", "max_logit"]
NAMES += ["entropy_bound", "n", "flag"]
ALL = [f"attention/all/{name}" for name in ("entropy_mean", "collapsed_share", "overloaded_share", "max_logit")]


def fitted(make, callbacks=(), loader=None, **kwargs):
    torch.manual_seed(0)
    model = make()
    trainer = fit(model, callbacks, loader or tokens(), **kwargs)
    return model, trainer


def watch(**kwargs):
    return AttentionEntropyMonitor(**{"every_n_steps": 2, "rows": LENGTH, **kwargs})


def layers_of(trainer):
    keys = [key for key in trainer.callback_metrics if key.startswith("attention/")]
    return list(dict.fromkeys(key.split("/")[1] for key in keys if "/all/" not in key))


class Dense(PointKeeper):
    """Computes what the first block's attention is in the batch of every point, from the model's weights."""

    def __init__(self):
        super().__init__()
        self.expected = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            block = pl_module.blocks[0]
            q, k, _ = block.attn.split(block.norm(pl_module.embed(batch)).double().float())
        self.expected.append(attention_entropy(q.double(), k.double(), is_causal=True, rows=LENGTH))


@pytest.mark.parametrize("how", ["fused", "softmax", "method", "module"])
def test_reads_what_the_model_computes_however_it_is_written(how):
    dense = Dense()
    _, trainer = fitted(lambda: GPT(how=how, sharpness=3.0), [watch(), dense])
    assert layers_of(trainer) == ["blocks.0.attn", "blocks.1.attn"]
    for name, read in (
        ("entropy_mean", lambda e: e.normalized.mean()),
        ("entropy_min", lambda e: e.normalized.amin()),
        ("entropy_max", lambda e: e.normalized.amax()),
        ("max_logit", lambda e: e.max_logit.amax()),
        ("entropy_bound", lambda e: e.bound.mean()),
        ("n", lambda e: e.rows[0]),
        ("flag", lambda e: torch.zeros(())),
    ):
        curve = trainer.logger.curve(f"attention/blocks.0.attn/{name}")
        assert [step for step, _ in curve] == [0, 1, 3, 5]
        found, expected = [value for _, value in curve], [float(read(dense.expected[i])) for i in (0, 1, 3, 5)]
        if name == "max_logit" and how != "fused":  # the first row sees one key: it does not count
            continue
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_every_curve_is_drawn_and_registered():
    _, trainer = fitted(GPT, [watch()])
    expected = {f"attention/blocks.{i}.attn/{name}" for i in (0, 1) for name in NAMES} | set(ALL)
    assert {key for key in trainer.callback_metrics if key.startswith("attention")} == expected
    assert set(NAMES) == set(watch().curves) <= {curve.name for curve in CURVES.values() if curve.family == "attention"}
    means = [trainer.callback_metrics[f"attention/blocks.{i}.attn/entropy_mean"] for i in (0, 1)]
    assert trainer.callback_metrics["attention/all/entropy_mean"] == pytest.approx(float(sum(means) / 2))


@pytest.mark.parametrize(("sharpness", "share"), [(0.0, (0, 1)), (1e4, (1, 0))])
def test_shares_of_collapsed_and_overloaded_heads(sharpness, share):
    # equal words are equal keys, and share the weight
    _, trainer = fitted(lambda: GPT(sharpness=sharpness), [watch(collapsed_below=0.2)])
    for layer in ("blocks.0.attn", "all"):
        for name, value in zip(("collapsed_share", "overloaded_share"), share, strict=True):
            assert trainer.callback_metrics[f"attention/{layer}/{name}"] == value
    assert trainer.callback_metrics["attention/all/entropy_mean"] == pytest.approx(share[1], abs=0.1)


@pytest.mark.parametrize("masked", ["nothing", "keys", "later"])
def test_multi_head_attention(masked):
    """Of torch's own layers, with the masks they take, which hide where torch's other function shows."""

    class Masked(Encoder):
        def forward(self, tokens):
            padding = torch.arange(LENGTH).expand(tokens.shape) >= torch.tensor([[24], [10]] * 4)
            options = {
                "nothing": {},
                "keys": {"src_key_padding_mask": padding},
                "later": {"mask": nn.Transformer.generate_square_subsequent_mask(LENGTH), "is_causal": True},
            }[masked]
            return self.head(self.encoder(self.embed(tokens), **options))

    expected = []

    class Keep(PointKeeper):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            layer = pl_module.encoder.layers[0]
            with torch.no_grad():
                x = layer.norm1(pl_module.embed(batch))
                projected = F.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(3, dim=-1)
                q, k, _ = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in projected)
            real = torch.arange(LENGTH).expand(8, -1) < torch.tensor([[24], [10]] * 4)
            options = {
                "nothing": {},
                "keys": {"attn_mask": real[:, None, None], "query_mask": real},
                "later": {"is_causal": True},
            }[masked]
            expected.append(attention_entropy(q, k, **options))

    _, trainer = fitted(Masked, [watch(), Keep()])
    assert layers_of(trainer) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    curve = trainer.logger.curve("attention/encoder.layers.0.self_attn/entropy_mean")
    assert [value for _, value in curve] == pytest.approx([float(expected[i].normalized.mean()) for i in (0, 1, 3, 5)])
    assert trainer.callback_metrics["attention/encoder.layers.0.self_attn/n"] == expected[5].rows[0]


@pytest.mark.parametrize("build", [{}, {"kdim": 16, "vdim": 16}, {"bias": False, "batch_first": True}])
def test_multi_head_attention_in_its_other_forms(build):
    class Cross(LightningModule):
        def __init__(self, **options):
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, HEADS, **build)
            self.options = options

        def training_step(self, batch, batch_idx):
            key = batch[..., : build.get("kdim", WIDTH)]
            output, weights = self.attn(batch, key, key, **self.options)
            self.weights = None if weights is None else weights.detach()
            return output.pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = DataLoader(3 * torch.randn(12, 20, WIDTH), batch_size=6)
    model, trainer = fitted(lambda: Cross(average_attn_weights=False), [watch()], loader)
    entropy = -torch.xlogy(model.weights, model.weights).sum(dim=-1).mean() / math.log(model.weights.shape[-1])
    for options in ({"average_attn_weights": False}, {"need_weights": True}, {"need_weights": False}):
        _, trainer = fitted(lambda options=options: Cross(**options), [watch()], loader)
        found = trainer.callback_metrics["attention/attn/entropy_mean"]
        assert found == pytest.approx(float(entropy), rel=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer_of_lightning_itself():
    class Language(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Transformer(vocab_size=WORDS, ninp=32, nhead=2, nhid=32, nlayers=2)

        def training_step(self, batch, batch_idx):
            output = self.model(batch[:, :-1], batch[:, 1:])
            return F.nll_loss(output.reshape(-1, WORDS), batch[:, 1:].reshape(-1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    _, trainer = fitted(Language, [watch()])
    kinds = ("decoder.layers.{}.self_attn", "decoder.layers.{}.multihead_attn", "encoder.layers.{}.self_attn")
    assert set(layers_of(trainer)) == {f"model.transformer.{kind.format(i)}" for kind in kinds for i in (0, 1)}
    assert all(trainer.callback_metrics[f"attention/{layer}/flag"] == 0 for layer in layers_of(trainer))


def test_attention_mask_of_the_batch():
    real = torch.arange(LENGTH) < 10
    _, trainer = fitted(GPT, [watch()], tokens(attention_mask=real.long()))
    assert trainer.callback_metrics["attention/blocks.0.attn/n"] == 8 * 9  # the first query sees one key
    _, trainer = fitted(lambda: GPT(how="softmax"), [watch()], tokens(attention_mask=real.long()))
    assert trainer.callback_metrics["attention/blocks.0.attn/n"] == 8 * 9


MODELS = {
    "gpt": GPT,
    "softmax": lambda: GPT(how="softmax"),
    "checkpointing": lambda: GPT(checkpointing=True),
    "checkpointing, reentrant": lambda: GPT(checkpointing="reentrant"),
    "encoder": Encoder,
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
def test_nothing_changes_and_every_point_comes(model, precision):
    watched, trainer = fitted(MODELS[model], [watch(rows=4)], precision=precision)
    state = torch.random.get_rng_state()
    plain, _ = fitted(MODELS[model], precision=precision)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    for layer in layers_of(trainer):
        assert [step for step, _ in trainer.logger.curve(f"attention/{layer}/entropy_mean")] == [0, 1, 3, 5]
        assert all(0 < value <= 1 + 1e-6 for _, value in trainer.logger.curve(f"attention/{layer}/entropy_mean"))
    assert len(layers_of(trainer)) == 2


def test_recomputation_is_not_heard_twice():
    counts = [fitted(MODELS[m], [watch()])[1].callback_metrics["attention/blocks.0.attn/n"] for m in list(MODELS)[:3]]
    assert counts == [8 * (LENGTH - 1)] * 3


def test_a_frozen_teacher_in_evaluation_mode_computes_as_without_us():
    """Torch's layers choose another order of operations when they are listened to."""

    class Distilled(GPT):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
            self.teacher = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).requires_grad_(False)
            self.targets = []

        def training_step(self, batch, batch_idx):
            self.teacher.eval()
            self.targets.append(self.teacher(self.embed(batch).detach()))
            return super().training_step(batch, batch_idx) + self.embed(batch).sub(self.targets[-1]).pow(2).mean()

    watched, trainer = fitted(Distilled, [watch(every_n_steps=1)])
    plain, _ = fitted(Distilled)
    assert all(map(torch.equal, watched.targets, plain.targets))
    assert layers_of(trainer) == ["blocks.0.attn", "blocks.1.attn"]


def test_nobody_listens_between_points(monkeypatch):
    heard, read = [], Entropies.__call__

    def spy(self, captured):
        heard.append(captured)
        return read(self, captured)

    monkeypatch.setattr(Entropies, "__call__", spy)

    class Modes(PointKeeper):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_before_zero_grad(self, *args):
            self.seen.append(torch.overrides.has_torch_function((torch.zeros(1),)))

    modes = Modes()
    fitted(GPT, [watch(every_n_steps=3), modes])
    assert len(heard) == 3 * 2
    assert not any(modes.seen)
    assert not torch.overrides.has_torch_function((torch.zeros(1),))


def test_gone_after_an_exception():
    class Failing(GPT):
        def forward(self, tokens):
            super().forward(tokens)
            return self.blocks[0](torch.zeros(1, 1, 3))

    model = Failing()
    with pytest.raises(RuntimeError):
        fit(model, [watch(every_n_steps=1)], tokens())
    assert not torch.overrides.has_torch_function((torch.zeros(1),))
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert "training_step" not in vars(model)


def test_layers_by_name():
    _, trainer = fitted(GPT, [watch(layers=["blocks.1"])])
    assert layers_of(trainer) == ["blocks.1"]
    with pytest.raises(MisconfigurationException, match=r"'nothing' matches no submodule of GPT"):
        fitted(GPT, [watch(layers=["nothing"])])


def test_attention_of_the_model_itself():
    class Flat(GPT):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList()

        def forward(self, tokens):
            x = self.embed(tokens).unsqueeze(1)
            return self.head(F.scaled_dot_product_attention(x, x, x).squeeze(1))

    _, trainer = fitted(Flat, [watch()])
    assert layers_of(trainer) == ["Flat"]


@pytest.mark.parametrize("reader", [read_qkv, lambda *call: AttentionCall(*read_qkv(*call)[:2], is_causal=True)])
def test_hidden_attention_and_how_to_point_at_it(reader):
    with pytest.warns(UserWarning, match=r"no attention was captured; its queries and keys are hidden.*layers=\{"):
        _, trainer = fitted(lambda: GPT(how="hidden"), [watch()])
    assert not layers_of(trainer)
    _, trainer = fitted(lambda: GPT(how="hidden"), [watch(layers={"blocks.*.attn": reader})])
    _, fused = fitted(GPT, [watch()])
    first = [t.logger.curve("attention/blocks.0.attn/entropy_mean")[0][1] for t in (trainer, fused)]
    assert first[0] == pytest.approx(first[1], rel=1e-2)  # not the same: this one has dropout
    assert layers_of(trainer) == layers_of(fused)


def test_a_reader_that_fails_does_not_end_the_run():
    with pytest.warns(UserWarning, match=r"attention of `blocks.0.attn` could not be read: AttributeError"):
        _, trainer = fitted(GPT, [watch(layers={"blocks.0.attn": lambda attn, args, kwargs: attn.no_such_thing})])
    assert trainer.state.finished


def test_nan_is_flagged_and_left_out():
    class Broken(GPT):
        def training_step(self, batch, batch_idx):
            if batch_idx >= 2:
                hook = self.embed.register_forward_hook(lambda m, a, out: out * (1 if batch_idx < 4 else torch.nan))
            if batch_idx in (2, 3):
                bad = torch.zeros(8, 1, 1)
                bad[0] = torch.nan
                hook.remove()
                hook = self.embed.register_forward_hook(lambda m, a, out: out + bad)
            loss = super().training_step(batch, batch_idx)
            if batch_idx >= 2:
                hook.remove()
            return self.head.weight.sum() if batch_idx in (2, 3) else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    keeper = PointKeeper()
    fitted(Broken, [watch(), keeper])
    entropy, n = keeper.curve("attention/blocks.0.attn/entropy_mean"), keeper.curve("attention/blocks.0.attn/n")
    assert [point.flag for point in entropy] == [Flag.OK, Flag.OK, Flag.NONFINITE, Flag.NONFINITE]
    assert [math.isnan(point.value) for point in entropy] == [False, False, False, True]
    assert [point.value for point in n] == [8 * 23, 8 * 23, 7 * 23, 0]


def test_a_layer_that_rests():
    class Resting(GPT):
        def training_step(self, batch, batch_idx):
            self.blocks[1].attn.forward = (
                (lambda x: x) if batch_idx == 3 else lambda x: Attention.forward(self.blocks[1].attn, x)
            )
            return super().training_step(batch, batch_idx)

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match=r"attention of `blocks.1.attn` was not captured before every point"):
        fitted(Resting, [watch(), keeper])
    points = keeper.curve("attention/blocks.1.attn/entropy_mean")
    assert [point.flag for point in points] == [Flag.OK, Flag.OK, Flag.NOT_CALLED, Flag.OK]
    assert [math.isnan(point.value) for point in points] == [False, False, True, False]


def test_resumed_run_continues_its_curves(tmp_path):
    _, whole = fitted(GPT, [watch()], max_epochs=2)
    _, half = fitted(GPT, [watch()])
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert not any("attention" in key for key in torch.load(tmp_path / "half.ckpt")["state_dict"])
    rest = Trainer(**{**QUIET, "max_epochs": 2, "logger": MemoryLogger(), "callbacks": [watch()]})
    rest.fit(GPT(), tokens(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for layer in layers_of(whole):
        for name in NAMES:
            key = f"attention/{layer}/{name}"
            assert half.logger.curve(key) + rest.logger.curve(key) == whole.logger.curve(key)


dynamo_looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@dynamo_looks_at_grad
@pytest.mark.parametrize("place", ["inside", "whole"])
def test_compiled(place):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Compiled(GPT):
        def __init__(self):
            super().__init__()
            if place == "inside":
                for block in self.blocks:
                    block.compile(backend=backend)

    def run(callbacks):
        graphs.clear()
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Compiled()
        trainer = fit(torch.compile(model, backend=backend) if place == "whole" else model, callbacks, tokens(12))
        return model, trainer, len(graphs)

    plain, _, alone = run([])
    with pytest.warns(UserWarning, match="compiled code hides its attention"):
        watched, trainer, number = run([watch()])
    assert number == alone
    assert not layers_of(trainer)
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    watched, trainer, few = run([watch(layers={"blocks.*.attn": read_qkv}, every_n_steps=6)])
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    assert [n for _, n in trainer.logger.curve("attention/blocks.1.attn/n")] == [8 * 23] * 3
    _, trainer, many = run([watch(layers={"blocks.*.attn": read_qkv}, every_n_steps=1)])
    assert len(trainer.logger.curve("attention/blocks.1.attn/n")) == 12
    assert alone == few == many  # no point costs a graph of its own


@dynamo_looks_at_grad
def test_a_compiled_function_inside_a_model_that_is_not():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) + F.softmax(q, dim=-1).mean()

    class Partly(GPT):
        def forward(self, tokens):
            x = self.embed(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            x = attend(x, x, x).transpose(1, 2).flatten(2)
            return self.head(self.blocks[1](x))

    torch.compiler.reset()
    watched, trainer = fitted(Partly, [watch()], tokens(12))
    assert len(graphs) <= 2
    plain, _ = fitted(Partly, loader=tokens(12))
    assert "blocks.1.attn" in layers_of(trainer)  # and "Partly" where the backend runs the graph in Python
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulation(accumulate):
    _, trainer = fitted(GPT, [watch(every_n_steps=1)], accumulate_grad_batches=accumulate)
    steps = [step for step, _ in trainer.logger.curve("attention/all/entropy_mean")]
    assert steps == {1: list(range(6)), 2: [0, 1, 2], 4: [0, 1]}[accumulate]


def test_a_model_without_attention_is_told_once_and_trains():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Toy(), [watch(), CollapseMonitor(every_n_steps=3)])
    [message] = [str(w.message) for w in told if "no attention was captured" in str(w.message)]
    assert "hidden" not in message
    assert "there may be none" in message


def test_two_monitors_in_one_run():
    first, second = watch(layers=["blocks.0.*"]), watch(layers=["blocks.1.*"])
    assert first.state_key != second.state_key
    model, trainer = fitted(GPT, [first, second])
    assert layers_of(trainer) == ["blocks.0.attn", "blocks.1.attn"]
    assert "training_step" not in vars(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": "blocks.0"}, r"Write `layers=\['blocks.0'\]`"),
        ({"layers": []}, "`layers` is empty"),
        ({"layers": {"blocks.0": "q"}}, "takes functions"),
        ({"rows": 0}, "`rows` must be at least 1, got 0"),
        ({"collapsed_below": 0.9, "overloaded_above": 0.1}, "in this order"),
        ({"every_n_steps": 0}, "`every_n_steps`"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        AttentionEntropyMonitor(**options)
