"""What ``AttentionLogitMonitor`` reads, keeps between points and leaves alone, through a real ``Trainer``."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.nn import functional as F  # noqa: N812

from lightning_collapse import AttentionEntropyMonitor, AttentionLogitMonitor, CollapseGuard
from lightning_collapse.functional import (
    effective_keys,
    head_cosine,
    head_cosine_null,
    head_divergence,
    key_participation,
    logit_bound,
    qk_increments,
    query_nmi,
    query_nmi_null,
    sink_weight,
)
from lightning_collapse.utilities import Flag
from tests.attention import GPT, HEADS, LENGTH, WIDTH, Encoder, read_qkv, tokens
from tests.toys import QUIET, MemoryLogger, PointKeeper, fit, weights

INCREMENTS = {f"delta{order}_{name}" for order in (2, 3) for name in ("norm", "stable_rank", "erank")}
STEPS = [0, 1, 3, 5]


def fitted(make, callbacks=(), loader=None, **kwargs):
    torch.manual_seed(0)
    model = make()
    return model, fit(model, callbacks, loader or tokens(), **kwargs)


def watch(**kwargs):
    return AttentionLogitMonitor(**{"every_n_steps": 2, "rows": LENGTH, "heads": HEADS, **kwargs})


class Dense(PointKeeper):
    """Queries, keys and weights of the first block before every step."""

    def __init__(self):
        super().__init__()
        self.calls, self.weights = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        block = pl_module.blocks[0]
        with torch.no_grad():
            q, k, _ = block.attn.split(block.norm(pl_module.embed(batch)))
        self.calls.append((q.double(), k.double()))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(pl_module.blocks[0].attn.qkv.weight.detach().double().clone())


def expected_of(q, k):
    """All curves of causal attention from the whole matrix, in double precision."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    p = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    seen = mask.sum(dim=-1).double()
    spread = torch.stack([logits[..., i, : i + 1].std(dim=-1, correction=0) for i in range(LENGTH)], dim=-1)
    long, rows = seen >= LENGTH / 2, seen > 1
    others = torch.stack([p[..., i, : i + 1].amax(dim=-1) for i in range(1, LENGTH)], dim=-1)
    lead = (others / (1 - others) * (seen[1:] - 1)).log() / (9 * (seen[1:] - 1)).log()
    shown = mask[1:]
    nmi, null = query_nmi(p[..., 1:, :]).mean(), query_nmi_null(shown).double()
    return {
        "max_logit": logits[..., 1:, :].masked_fill(~shown, -torch.inf).max(),
        "min_logit": logits[..., 1:, :].masked_fill(~shown, torch.inf).min(),
        "head_cosine": head_cosine(p)[:, long].mean(),
        "head_divergence": head_divergence(p)[:, long].mean(),
        "query_nmi": nmi,
        "query_nmi_excess": nmi - null,
        "sink_share": (sink_weight(p[..., 1:, :], shown) > 0.3).double().mean(),
        "effective_keys": (effective_keys(p).simpson / seen)[..., rows].mean(),
        "logit_lead": lead.max(),
        "key_participation": key_participation(k).mean(),
    }, {
        "head_cosine": head_cosine_null(spread)[:, long].mean(),
        "query_nmi": null,
        "effective_keys": (-spread.square()).exp()[..., rows].mean(),
        "key_participation": torch.tensor(1 / (1 + WIDTH / HEADS / LENGTH)),
    }


@pytest.mark.parametrize("how", ["fused", "softmax"])
def test_it_reads_what_the_model_computes(how):
    dense = Dense()
    fitted(lambda: GPT(how=how, sharpness=3.0), [watch(), dense])
    values, nulls = expected_of(*dense.calls[5])
    if how == "softmax":  # logits show no keys
        del values["key_participation"], nulls["key_participation"]
    points = {point.measure: point for point in dense.points if point.layer == "blocks.0.attn" and point.step == 5}
    for name, value in values.items():
        assert points[name].value == pytest.approx(float(value), rel=2e-4, abs=1e-5), name
    for name, null in nulls.items():
        assert points[name].null == pytest.approx(float(null), rel=1e-4, abs=1e-6), name
    assert points["n"].value == 8 * (LENGTH - 1)
    assert points["flag"].value == 0
    assert [point.step for point in dense.curve("attention/blocks.0.attn/max_logit")] == STEPS


def test_the_bound_is_that_of_every_step_since_the_last_point():
    dense = Dense()
    fitted(lambda: GPT(sharpness=3.0), [watch(), dense])
    bounds = [float(logit_bound(q, k).max()) for q, k in dense.calls]
    found = [point.value for point in dense.curve("attention/blocks.0.attn/qk_bound")]
    assert found == pytest.approx([bounds[0], bounds[1], max(bounds[2:4]), max(bounds[4:6])], rel=1e-5)
    largest = [point.value for point in dense.curve("attention/blocks.0.attn/max_logit")]
    assert all(logit < bound for logit, bound in zip(largest, found, strict=True))


def test_increments_are_those_of_the_weights_between_points():
    dense = Dense()
    fitted(GPT, [watch(), dense])
    before, after = ([part.unflatten(0, (HEADS, -1)).mT for part in dense.weights[i].chunk(3)[:2]] for i in (3, 5))
    expected = qk_increments(*before, *after)
    for order, increment in zip((2, 3), expected, strict=True):
        for name, value in zip(("norm", "stable_rank", "erank"), increment, strict=True):
            curve = dense.curve(f"attention/blocks.0.attn/delta{order}_{name}")
            assert [point.step for point in curve] == STEPS[1:]
            assert curve[-1].value == pytest.approx(float(value.mean()), rel=2e-2)


def test_a_point_rests_on_some_heads_and_rows_at_defaults():
    keeper = PointKeeper()
    fitted(GPT, [AttentionLogitMonitor(every_n_steps=2), keeper])
    assert keeper.curve("attention/blocks.1.attn/n")[0].value == 8 * 15  # the first query sees one key
    assert keeper.curve("attention/blocks.1.attn/delta2_erank")
    silent = PointKeeper()
    fitted(GPT, [watch(heads=0, bound=False), silent])
    assert not {point.measure for point in silent.points} & (INCREMENTS | {"qk_bound"})


def test_multi_head_attention_has_no_bound_and_all_the_rest():
    keeper = PointKeeper()
    fitted(Encoder, [watch(), keeper])
    found = {point.measure for point in keeper.points if point.layer == "encoder.layers.1.self_attn"}
    assert "qk_bound" not in found
    assert found >= INCREMENTS | {"max_logit", "query_nmi", "key_participation"}


def test_half_precision_weights_have_no_increments():
    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="differences of weights in half precision are rounding"):
        fitted(GPT, [watch(), keeper], precision="bf16-true")
    assert not {point.measure for point in keeper.points} & INCREMENTS
    assert keeper.curve("attention/blocks.0.attn/max_logit")


def test_padding_does_not_count():
    keeper, real = PointKeeper(), torch.arange(LENGTH) < 10
    fitted(GPT, [watch(), keeper], tokens(attention_mask=real.long()))
    assert keeper.curve("attention/blocks.0.attn/n")[0].value == 8 * 9


def test_the_same_logit_as_the_entropy_monitor_reads():
    keeper, other = PointKeeper(), PointKeeper()
    fitted(GPT, [watch(rows=16), keeper])
    fitted(GPT, [AttentionEntropyMonitor(every_n_steps=2), other])
    for layer in ("blocks.0.attn", "all"):
        found, expected = (k.curve(f"attention/{layer}/max_logit") for k in (keeper, other))
        assert [p.value for p in found] == pytest.approx([p.value for p in expected], rel=1e-6)


def test_nan_is_flagged_and_left_out():
    class Broken(GPT):
        def training_step(self, batch, batch_idx):
            bad = torch.zeros(8, 1, 1)
            bad[0] = torch.nan
            if batch_idx < 2:
                return super().training_step(batch, batch_idx)
            with torch.no_grad():
                F.cross_entropy(self.head(self.blocks[0](self.embed(batch) + bad)).flatten(0, 1), batch.flatten())
            return self.head.weight.sum()

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match=r"attention of `blocks.1.attn` was not captured before every point"):
        fitted(Broken, [watch(heads=0), keeper])
    curve = keeper.curve("attention/blocks.0.attn/head_cosine")
    assert [point.flag for point in curve] == [Flag.OK, Flag.OK, Flag.NONFINITE, Flag.NONFINITE]
    assert all(math.isfinite(point.value) for point in curve)
    assert keeper.curve("attention/blocks.0.attn/n")[2].value == 7 * (LENGTH - 1)


def test_readers_show_hidden_attention():
    keeper = PointKeeper()
    fitted(lambda: GPT(how="hidden"), [watch(layers={"blocks.*.attn": read_qkv}), keeper])
    assert keeper.curve("attention/blocks.0.attn/head_divergence")
    with pytest.warns(UserWarning, match="no attention was captured; its queries and keys are hidden"):
        fitted(lambda: GPT(how="hidden"), [watch()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_nothing_changes(precision):
    watched, _ = fitted(GPT, [watch()], precision=precision)
    plain, _ = fitted(GPT, precision=precision)
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    assert not torch.overrides.has_torch_function((torch.zeros(1),))
    assert "training_step" not in vars(watched)


def test_a_run_cut_off_between_points_goes_on_as_if_it_had_not(tmp_path):
    """With what the bound and the increments keep: a checkpoint in the middle of the way to a point."""

    def part(keeper, epochs, **kwargs):
        torch.manual_seed(0)
        options = {**QUIET, "max_epochs": epochs, "logger": MemoryLogger()}
        trainer = Trainer(**options, callbacks=[watch(every_n_steps=4), keeper])
        trainer.fit(GPT(sharpness=2.0), tokens(), **kwargs)
        return trainer

    class Save(PointKeeper):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    whole, rest = PointKeeper(), PointKeeper()
    part(whole, 2)
    part(Save(), 1)
    part(rest, 2, ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    found = {(point.key, point.step): point.value for point in rest.points}
    expected = {(point.key, point.step): point.value for point in whole.points if point.step > 5}
    assert {key[0].rpartition("/")[2] for key in expected} >= INCREMENTS | {"qk_bound"}
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_growing_logits_are_told_by_name():
    class Growing(GPT):
        def on_train_batch_end(self, *args):
            self.blocks[1].attn.sharpness *= 1.15 if self.global_step > 40 else 1.0

    def fit_of(model):
        guard = CollapseGuard("log", rules=["attention_logit_growth"])
        monitor = AttentionLogitMonitor(every_n_steps=1, bound=False, heads=0)
        fitted(model, [monitor, guard], tokens(70))
        return guard

    guard = fit_of(Growing)
    assert [(verdict.kind, verdict.layer) for verdict in guard.verdicts] == [
        ("attention_logit_growth", "blocks.1.attn")
    ]
    assert 38 <= guard.verdicts[0].since <= guard.verdicts[0].step <= 60
    assert not fit_of(GPT).verdicts


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": "blocks.0"}, r"Write `layers=\['blocks.0'\]`"),
        ({"layers": {"blocks.0": "q"}}, "takes functions"),
        ({"rows": 0}, "`rows`"),
        ({"heads": -1}, "`heads`"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        AttentionLogitMonitor(**options)


def test_layers_that_are_not_there():
    with pytest.raises(MisconfigurationException, match=r"AttentionLogitMonitor.*'nothing' matches no submodule"):
        fitted(GPT, [watch(layers=["nothing"])])
