"""Encoders have a gain, of whole maps and valid tokens; decoders never."""

import math
from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F  # noqa: N812

from lightning_collapse import AttentionEntropyMonitor, AttentionGainMonitor
from lightning_collapse.functional import low_pass_gain, low_pass_gain_null
from lightning_collapse.monitoring import attention_gain
from lightning_collapse.monitoring.attention_gain import GainStatistics
from lightning_collapse.utilities.attention_calls import AttentionCall
from lightning_collapse.utilities.points import Flag
from tests.attention import GPT, HEADS, Encoder, tokens
from tests.toys import PointKeeper, fit

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
LAYERS = ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")


def call(batch=2, length=12, heads=4, **kwargs):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, batch, heads, length, 8, generator=generator)
    return AttentionCall(query, key, **kwargs)


def weights(of):
    return (of.query @ of.key.mT * of.query.shape[-1] ** -0.5).softmax(-1)


def read(captured):
    sums, largest = GainStatistics()(captured)
    return GainStatistics.read(torch.cat([sums, largest], dim=1).double())


def test_mean_largest_and_null_are_those_of_all_heads_and_samples():
    of = call()
    gains, found = low_pass_gain(weights(of)), read(of)
    assert found["mean"] == pytest.approx(gains.mean().item(), rel=1e-5)
    assert found["largest"] == pytest.approx(gains.max().item(), rel=1e-5)
    logits = of.query @ of.key.mT * 8**-0.5
    spread = logits.var(dim=-1).mean(dim=-1).sqrt()
    assert spread.max() > 1  # heavy tails: there is no null of such maps
    assert math.isnan(found["null"])
    small = of._replace(scale=0.1)
    null = low_pass_gain_null(spread * 0.1 / 8**-0.5, torch.tensor(12)).mean().item()
    assert read(small)["null"] == pytest.approx(null, rel=1e-4)


def test_padding_on_either_side_reads_as_if_it_were_not_there():
    of = call()
    real = torch.zeros(2, 12, dtype=torch.bool)
    real[0, :9] = real[1, 4:] = True
    parts = [
        low_pass_gain(weights(AttentionCall(of.query[i : i + 1, :, keep], of.key[i : i + 1, :, keep])))
        for i, keep in enumerate(real)
    ]
    expected = torch.cat(parts).mean().item()
    mask = real[:, None, None]
    masked = (of.query @ of.key.mT * 8**-0.5).masked_fill(~(mask & mask.mT), -torch.inf)
    for captured in (
        of._replace(attn_mask=mask, query_mask=real),
        of._replace(attn_mask=mask),  # what no query sees is no query that counts
        of._replace(attn_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e9), query_mask=real),
        masked,
    ):
        assert read(captured)["maps"] == 8
        assert read(captured)["mean"] == pytest.approx(expected, rel=1e-5)


def test_causal_windowed_packed_and_cross_attention_have_none():
    of, place = call(), torch.arange(12)
    near = (place - place.unsqueeze(1)).abs() < 4
    packed = (place // 6) == (place // 6).unsqueeze(1)
    for other in (
        of._replace(is_causal=True),
        of._replace(attn_mask=near),
        of._replace(attn_mask=packed),
        of._replace(key=of.key[:, :, :6]),
        (of.query @ of.key.mT).masked_fill(place > place.unsqueeze(1), -torch.inf),
    ):
        found = read(other)
        assert (found["seen"], found["maps"], found["lost"]) == (8, 0, 0)
        assert math.isnan(found["mean"])


def test_shared_keys_many_heads_and_bad_numbers(monkeypatch):
    of = call()
    grouped = of._replace(key=of.key[:, :2])
    same = of._replace(key=of.key[:, :2].repeat_interleave(2, dim=1))
    assert read(grouped)["mean"] == pytest.approx(read(same)["mean"], rel=1e-6)
    monkeypatch.setattr(attention_gain, "MOST", 2 * 2 * 144)  # two heads of two samples
    for some in (grouped, same, same.query @ same.key.mT * 8**-0.5):
        sums, _ = GainStatistics()(some)
        kept = sums[:, 1] > 0
        assert kept.sum() == 2
        assert sums[kept, 3].sum() == pytest.approx(low_pass_gain(weights(same))[:, kept].sum().item(), rel=1e-5)
    bad = of._replace(query=of.query.index_fill(0, torch.tensor([0]), torch.nan))
    assert (read(bad)["maps"], read(bad)["lost"]) == (2, 2)
    monkeypatch.setattr(attention_gain, "LONGEST", 8)
    with pytest.raises(ValueError, match="maps of 12 tokens are too large"):
        GainStatistics()(of)


def test_points_of_an_encoder_in_training():
    torch.manual_seed(0)
    keeper, model, loader = PointKeeper(), Encoder(dropout=0.0), tokens(6, 40)
    first, rows = deepcopy(model.encoder.layers[0]), model.embed(next(iter(loader))).detach()
    fit(model, [AttentionGainMonitor(every_n_steps=3), AttentionEntropyMonitor(every_n_steps=3), keeper], loader)
    for layer in LAYERS:
        curve = keeper.curve(f"attention/{layer}/low_pass_gain")
        assert [point.step for point in curve] == [0, 2, 5]
        assert {point.n for point in curve} == {20 * HEADS}  # every second of 40 sequences
        assert all(0 < point.value < 1 and point.flag == Flag.OK for point in curve)
    query, key, _ = first.self_attn.in_proj_weight.chunk(3)
    query, key = (
        F.linear(first.norm1(rows), weight).unflatten(-1, (HEADS, -1)).transpose(1, 2) for weight in (query, key)
    )
    gains = low_pass_gain(weights(AttentionCall(query, key)))[::2]
    found = keeper.curve(f"attention/{LAYERS[0]}/low_pass_gain")[0].value
    assert found == pytest.approx(gains.mean().item(), rel=1e-4)
    together = keeper.curve("attention/all/low_pass_gain")[-1].value
    each = [keeper.curve(f"attention/{layer}/low_pass_gain")[-1].value for layer in LAYERS]
    assert together == pytest.approx(sum(each) / 2, rel=1e-9)


@pytest.mark.parametrize("how", ["fused", "softmax"])
def test_a_decoder_is_given_no_such_curve_and_is_told_once(how):
    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="no attention is bidirectional here") as said:
        fit(GPT(how=how), [AttentionGainMonitor(every_n_steps=2), keeper], tokens())
    assert keeper.points == []
    assert sum("bidirectional" in str(w.message) for w in said) == 1


def test_maps_that_hold_no_numbers_are_flagged():
    class Broken(Encoder):
        def training_step(self, batch, batch_idx):
            hidden = self.embed(batch) * torch.nan
            return F.cross_entropy(self.head(self.encoder(hidden)).flatten(0, 1), batch.flatten())

    keeper = PointKeeper()
    fit(Broken(), [AttentionGainMonitor(every_n_steps=6), keeper], tokens())
    assert {point.flag for point in keeper.points} == {Flag.NONFINITE}
    assert all(math.isnan(point.value) for point in keeper.points)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(MisconfigurationException, match=r"`AttentionGainMonitor\(layers=\['nothing'\]\)`"):
        fit(Encoder(), [AttentionGainMonitor(["nothing"])], tokens())
