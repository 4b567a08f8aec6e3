"""Two processes scale alike, by the largest logit that either has seen; shards are refused. Other layers too."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_collapse import AttentionLogitMonitor, QKClip
from lightning_collapse.functional import logit_bound, logit_extremes
from tests.attention import GPT, HEADS, LENGTH, Encoder, tokens
from tests.distributed.converted_layers import (
    check_constrained_fit,
    check_running_means,
    check_sharded_and_wrapped,
    check_sharded_fit,
    running_means,
)
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, MemoryLogger, PointKeeper


class Uneven(GPT):
    """Every process sees its own batches, of different size; the loss moves nothing."""

    def training_step(self, batch, batch_idx):
        self(batch[: 5 if self.global_rank else 8])
        return sum(parameter.sum() for parameter in self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    @torch.no_grad()
    def of_block(self, batch):
        query, key, _ = self.blocks[0].attn.split(self.blocks[0].norm(self.embed(batch)))
        return query, key


class Sharded(Encoder):
    def configure_model(self):
        for layer in self.encoder.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def _fit(rank, model, callbacks, strategy, steps=8):
    keeper = PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": MemoryLogger(), "use_distributed_sampler": False}
    trainer = Trainer(**options, callbacks=[*callbacks, keeper], log_every_n_steps=1)
    trainer.fit(model, tokens(steps, seed=rank))
    return keeper


def _batch(rank, step=0):
    return list(tokens(8, seed=rank))[step][: 5 if rank else 8]


def _check(rank, alone):
    torch.manual_seed(0)
    model = Uneven().double()
    both = torch.cat([_batch(0), _batch(1)])
    before = logit_extremes(*model.of_block(both), is_causal=True).highest
    tau = float(before.median())
    keeper = _fit(rank, model, [QKClip(tau=tau, layers=["blocks.0.*"])], DDPStrategy(process_group_backend="gloo"), 1)
    after = logit_extremes(*model.of_block(both), is_causal=True).highest
    torch.testing.assert_close(after, before.clamp_max(tau), rtol=1e-12, atol=0)
    assert keeper.curve("qk_clip/blocks.0.attn/max_logit")[0].value == pytest.approx(float(before.max()), rel=1e-6)
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, (keeper.points, [p.detach() for p in model.parameters()]))
    assert repr(everyone[0][0]) == repr(everyone[1][0])
    assert all(map(torch.equal, everyone[0][1], everyone[1][1]))
    assert 0 < keeper.curve("qk_clip/blocks.0.attn/clipped_share")[0].value < 1
    _check_monitor(rank)
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    with pytest.raises(MisconfigurationException, match=r"layers.0.self_attn` exactly: its weights are sharded"):
        _fit(rank, Sharded(), [QKClip()], sharded)
    check_sharded_and_wrapped()
    check_sharded_fit(rank)
    check_constrained_fit()
    check_running_means(rank, alone)


def _check_monitor(rank):
    """One set of curves, of both."""
    torch.manual_seed(0)
    model = Uneven()
    monitor = AttentionLogitMonitor(every_n_steps=2, rows=LENGTH, heads=HEADS)
    keeper = _fit(rank, model, [monitor], DDPStrategy(process_group_backend="gloo"))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, keeper.points)
    assert repr(everyone[0]) == repr(everyone[1])
    both = [torch.cat([_batch(0, step), _batch(1, step)]) for step in range(8)]
    largest = logit_extremes(*model.of_block(both[3]), is_causal=True)
    point = next(p for p in keeper.curve("attention/blocks.0.attn/min_logit") if p.step == 3)
    assert point.value == pytest.approx(float(largest.lowest.min()), rel=1e-5)
    assert point.n == 13 * (LENGTH - 1)
    bounds = [float(logit_bound(*model.of_block(batch)).max()) for batch in both]
    found = [point.value for point in keeper.curve("attention/blocks.0.attn/qk_bound")]
    assert found == pytest.approx([bounds[0], bounds[1], *(max(bounds[i : i + 2]) for i in (2, 4, 6))], rel=1e-5)


def test_two_processes():
    on_two_processes(_check, running_means(lambda rows: rows))
