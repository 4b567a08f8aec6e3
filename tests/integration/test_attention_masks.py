"""What ``AttentionEntropyMonitor`` reads of attention with masks and sinks, through a real ``Trainer``."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_collapse import AttentionEntropyMonitor
from tests.toys import fit

HEADS, LENGTH, WIDTH = 2, 16, 8


class Uniform(nn.Module):
    """Causal attention of queries of zero, which shares the weight evenly among the keys that are seen."""

    def __init__(self, hide: float, sink: bool, fused: bool):
        super().__init__()
        self.value = nn.Linear(WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.tensor([2.0, 0.0]).reshape(1, HEADS, 1, 1))
        self.hide, self.sink, self.fused = hide, sink, fused

    def forward(self, x):
        key = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        value = self.value(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        mask = torch.zeros(LENGTH, LENGTH, dtype=x.dtype).masked_fill(later, self.hide)
        if self.fused:
            return F.scaled_dot_product_attention(torch.zeros_like(key), key, value, attn_mask=mask)
        logits = torch.zeros_like(key) @ key.mT + mask
        if self.sink:
            logits = torch.cat([logits, self.sinks.to(x).expand(len(x), -1, LENGTH, -1)], dim=-1)
        return logits.softmax(dim=-1)[..., :LENGTH] @ value


class Lit(LightningModule):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def training_step(self, batch, batch_idx):
        return self.attention(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def reading(attention, **kwargs):
    loader = DataLoader(torch.randn(8, LENGTH, WIDTH), batch_size=4)
    monitor = AttentionEntropyMonitor(every_n_steps=2, rows=LENGTH)
    return fit(Lit(attention), [monitor], loader, **kwargs).callback_metrics


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("hide", [-torch.inf, -1e9, -1e4, "lowest"])
@pytest.mark.parametrize("how", ["fused", "softmax", "sink"])
def test_uniform_causal_attention_reads_one(how, hide, precision):
    number = torch.finfo(torch.bfloat16 if precision == "bf16-true" else torch.float32).min
    attention = Uniform(number if hide == "lowest" else hide, how == "sink", how == "fused")
    found = reading(attention, precision=precision)
    assert found["attention/attention/entropy_mean"] == pytest.approx(1.0, abs=1e-3)
    assert found["attention/attention/n"] == 4 * (LENGTH - 1)  # the first query has nothing to choose from


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}])
def test_sinks_of_multi_head_attention(options):
    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
            with torch.no_grad():
                self.inner.in_proj_weight[:WIDTH] = 0
                self.inner.in_proj_bias[:WIDTH] = 1
                self.inner.in_proj_weight[WIDTH : 2 * WIDTH] = 0

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    found = reading(Self())
    assert found["attention/attention.inner/entropy_mean"] == pytest.approx(1.0, abs=1e-2)
    assert found["attention/attention.inner/n"] == 4 * LENGTH
