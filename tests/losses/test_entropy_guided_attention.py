"""Entropy-guided attention: its three forms against loops, where it begins, what it needs, and training with it."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_collapse import AntiCollapseMixin
from lightning_collapse.losses import EntropyGuidedAttention
from tests.toys import QUIET

B, H, T, LAYERS = 2, 3, 6, 2


def logits(seed: int = 0, length: int = T, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(LAYERS, B, H, length, length, generator=generator, dtype=torch.float64)


def maps(scores: Tensor, causal: bool = True) -> tuple[Tensor, ...]:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1) & causal
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1).unbind()


def naive(guide: EntropyGuidedAttention, attentions: Any, causal: bool = True) -> Tensor:
    """Row by row, without the constant inside the logarithm."""
    layers = []
    for attention, thresholds in zip(attentions, guide.thresholds, strict=True):
        heads, log_keys = [], math.log(attention.shape[-1])
        for h, threshold in enumerate(thresholds):
            values = []
            for sequence in attention:
                for i, row in enumerate(sequence[h]):
                    seen = row[: i + 1] if causal else row
                    entropy = -(seen * seen.log()).sum()
                    if guide.form == "normalized" and len(seen) > 1:
                        values.append(entropy / math.log(len(seen)))
                    elif guide.form != "normalized":
                        values.append(entropy / log_keys)
            if guide.form != "code":
                values, n = [sum(values) / len(values)], len(values)
            else:
                n = len(values)
            deviations = [value - threshold for value in values]
            if guide.hinge:
                penalties = [(d.abs() - guide.margin).clamp_min(0) ** 2 for d in deviations]
            else:
                penalties = [d**2 if d.abs() > guide.margin else 0 * d for d in deviations]
            mean = log_keys**2 * sum(penalties) / len(penalties)
            heads.append(mean * n if guide.reduction == "sum" else mean)
        layers.append(sum(heads) / len(heads))
    return sum(layers) / len(layers)


def guide_of(**arguments: Any) -> EntropyGuidedAttention:
    guide = EntropyGuidedAttention(LAYERS, H, **{"margin": 0.1, **arguments}).double()
    guide.thresholds.data = torch.tensor([[0.2, 0.5, 0.9], [1.0, 0.45, 0.0]], dtype=torch.float64)
    return guide


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("hinge", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["normalized", "paper", "code"])
def test_value_and_gradient_are_the_reference(form: str, reduction: str, hinge: bool, causal: bool) -> None:
    guide = guide_of(form=form, reduction=reduction, hinge=hinge)
    scores = logits().requires_grad_()
    value, expected = guide(*maps(scores, causal)), naive(guide, maps(scores, causal), causal)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    leaves = [scores, guide.thresholds]
    for found, exact in zip(*(torch.autograd.grad(v, leaves) for v in (value, expected)), strict=True):
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["normalized", "paper"])
def test_gradcheck(form: str) -> None:
    guide, scores = guide_of(form=form, hinge=True), logits(length=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, _: guide(*maps(s)), [scores, guide.thresholds], fast_mode=True)


def released(attentions: Any, thresholds: Tensor, margin: float) -> Tensor:
    """What the authors' code computes, without their weight."""
    total, largest = torch.zeros((), dtype=torch.float64), math.log(attentions[0].shape[-1])
    for attention, of_layer in zip(attentions, thresholds, strict=True):
        entropy = -torch.nansum(attention * (attention + 1e-9).log(), dim=-1)
        for head in range(attention.shape[1]):
            deviation = entropy[:, head] - of_layer[head] * largest
            total = total + deviation[deviation.abs() > margin * largest].square().sum() / attention.shape[1]
    return total / len(attentions)


def test_released_form() -> None:
    guide, read = guide_of(form="code", reduction="sum", margin=0.2), maps(logits())
    torch.testing.assert_close(guide(*read), released(read, guide.thresholds, 0.2))
    mean = guide_of(form="code", margin=0.2)
    torch.testing.assert_close(guide(*read), mean(*read) * B * T)


@pytest.mark.parametrize("form", ["normalized", "paper"])
@pytest.mark.parametrize("causal", [True, False])
def test_it_begins_at_zero_after_calibration(form: str, causal: bool) -> None:
    guide = EntropyGuidedAttention(LAYERS, H, form=form)
    scores = logits(length=64, scale=1.0).float().requires_grad_()
    read = maps(scores, causal)
    guide.calibrate_(*read)
    value = guide(*read)
    assert value == 0
    grads = torch.autograd.grad(value, [scores, guide.thresholds])
    assert all((grad == 0).all() for grad in grads)  # and no NaN of the first row, which sees one key
    assert guide(*maps(logits(1, 64, 1.0).float(), causal)) == 0  # inside the band on another batch


def test_what_a_causal_mask_does_to_the_published_forms() -> None:
    """A threshold of the normalized entropy is out of reach for the mean over rows, and most for single rows."""
    uniform = maps(torch.zeros(LAYERS, 1, H, 128, 128, dtype=torch.float64))
    paper, ours = (EntropyGuidedAttention(LAYERS, H, form=form).double() for form in ("paper", "normalized"))
    for guide in (paper, ours):
        guide.calibrate_(*uniform)
    largest = math.lgamma(129) / (128 * math.log(128))
    assert largest == pytest.approx(0.799, abs=1e-3)
    torch.testing.assert_close(paper.thresholds.detach(), torch.full((LAYERS, H), largest, dtype=torch.float64))
    torch.testing.assert_close(ours.thresholds.detach(), torch.ones(LAYERS, H, dtype=torch.float64))
    rows = maps(logits(length=64, scale=1.0))
    ours.calibrate_(*rows)
    paper.thresholds.data.copy_(ours.thresholds)
    means, _ = paper._means(rows, None)
    assert (means - paper.thresholds).mean().item() == pytest.approx(-0.19, abs=0.01)
    entropy = -(torch.stack(rows) * (torch.stack(rows) + 1e-9).log()).sum(dim=-1) / math.log(64)
    outside = ((entropy - paper.thresholds[:, None, :, None]).abs() > 0.2).double().mean()
    assert outside.item() == pytest.approx(0.38, abs=0.02)


def test_the_jump_at_the_edge_of_the_band() -> None:
    flat = torch.full((1, 1, 1, 128), 1 / 128, dtype=torch.float64)
    values = {}
    for hinge in (False, True):
        for threshold in (0.8 + 1e-6, 0.8 - 1e-6):
            guide = EntropyGuidedAttention(1, 1, hinge=hinge).double()
            guide.thresholds.data.fill_(threshold)
            values[hinge, threshold > 0.8] = guide(flat).item()
    assert values[False, True] == 0
    assert values[False, False] == pytest.approx((0.2 * math.log(128)) ** 2, rel=1e-4)
    assert (0.2 * math.log(128)) ** 2 == pytest.approx(0.94, abs=5e-3)
    assert 0 <= values[True, True] < values[True, False] < 1e-9


def test_padding_and_half_precision() -> None:
    guide = guide_of()
    scores = logits()
    padded = torch.cat([scores, torch.full((LAYERS, B, H, T, 2), -torch.inf, dtype=torch.float64)], dim=-1)
    expected = guide(*maps(scores, causal=False)) * math.log(T + 2) ** 2 / math.log(T) ** 2
    read = padded.softmax(dim=-1)
    torch.testing.assert_close(guide(*read), expected, rtol=1e-7, atol=0)
    visible = torch.arange(T + 2) < T
    torch.testing.assert_close(guide(*read, visible=visible), expected, rtol=1e-7, atol=0)
    single = guide.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = single(*read.bfloat16(), visible=visible)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, single(*read.bfloat16().float(), visible=visible))
    sharp = torch.zeros(B, H, T, T).index_fill(3, torch.tensor([0]), 1.0).requires_grad_()
    single(sharp, sharp).backward()  # no logarithm of nothing
    assert sharp.grad.isfinite().all()


def test_it_says_what_it_needs() -> None:
    guide, (first, second) = guide_of(), maps(logits())
    with pytest.raises(ValueError, match=r"Attention map 1 is None: fused attention .*attn_implementation='eager'"):
        guide(first, None)
    with pytest.raises(ValueError, match=r"shape \(B, 3, L, S\), got \(2, 6, 6\) of map 1.*average_attn_weights=False"):
        guide(first, second.mean(dim=1))
    with pytest.raises(ValueError, match="takes 2 attention maps, one of each layer, got 1"):
        guide(first)
    with pytest.raises(ValueError, match=r"`form` must be one of \('normalized', 'paper', 'code'\), got 'papr'"):
        EntropyGuidedAttention(1, 1, form="papr")


class Guided(AntiCollapseMixin, LightningModule):
    """Two layers of causal attention, whose entropy is to be what it was."""

    def __init__(self, maps_of_the_last: bool = True) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.guide = EntropyGuidedAttention(layers=2, heads=2, margin=0.0, hinge=True)
        self.maps_of_the_last = maps_of_the_last
        self.set_regularizers({"entropy": (0.5, self.guide)})

    def forward(self, x: Tensor) -> list[Tensor | None]:
        later, read = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), []
        for i, layer in enumerate(self.attention):
            wanted = self.maps_of_the_last or i == 0
            mixed, weights = layer(x, x, x, attn_mask=later, need_weights=wanted, average_attn_weights=False)
            x = x + mixed
            read.append(weights)
        return read

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.anti_collapse_loss(*self(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        self.guide.clamp_after(optimizer)
        return optimizer


def test_training_through_the_mixin() -> None:
    torch.manual_seed(0)
    model, rows = Guided(), torch.randn(12, 5, 8)
    model.guide.thresholds.data.fill_(3.0)  # out of range, and out of reach
    before = model.attention[0].in_proj_weight.detach().clone()
    trainer = Trainer(**{**QUIET, "max_epochs": 1, "logger": False, "log_every_n_steps": 1})
    trainer.fit(model, DataLoader(rows, batch_size=4))
    assert (model.guide.thresholds <= 1).all()
    assert not torch.equal(model.attention[0].in_proj_weight, before)
    assert trainer.callback_metrics["regularizer/entropy/value"] > 0
    names = [name for name, p in model.named_parameters() if p is model.guide.thresholds]
    assert len(names) == 1


def test_the_mixin_tells_of_a_layer_without_a_map() -> None:
    with pytest.raises(ValueError, match="Attention map 1 is None: fused attention makes no map"):
        Guided(maps_of_the_last=False).training_step(torch.randn(2, 5, 8), 0)
