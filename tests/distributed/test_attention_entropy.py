"""Two processes draw one set of curves of the attention of both, sharded or not."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_collapse import AttentionEntropyMonitor, AttentionGainMonitor
from lightning_collapse.functional import attention_entropy
from lightning_collapse.metrics import AttentionEntropy
from tests.attention import GPT, HEADS, LENGTH, Encoder, tokens
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, MemoryLogger, PointKeeper, weights


class Uneven(GPT):
    """Every process sees its own batches, of different size; the second block rests on one of them, and at first."""

    def __init__(self):
        super().__init__(sharpness=2.0)
        self.seen = []

    def training_step(self, batch, batch_idx):
        batch = batch[: 5 if self.global_rank else 8]
        with torch.no_grad():
            self.seen.append(self.blocks[0].attn.split(self.blocks[0].norm(self.embed(batch)))[:2])
        hidden = self.blocks[0](self.embed(batch))
        late = self.blocks[1](hidden)
        if self.global_rank == 0 or batch_idx < 2:  # its attention is heard on one process only, from the second point
            self.blocks[1].attn.how = "hidden"
        else:
            self.blocks[1].attn.how = "fused"
        return torch.nn.functional.cross_entropy(self.head(late).flatten(0, 1), batch.flatten())


class Sharded(Encoder):
    def configure_model(self):
        for layer in self.encoder.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def _fit(rank, model, callbacks, strategy):
    keeper = PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": MemoryLogger(), "use_distributed_sampler": False}
    trainer = Trainer(**{**options, "callbacks": [*callbacks, keeper]})
    trainer.fit(model, tokens(8, seed=rank))
    return model, keeper


def _same_everywhere(mine):
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _check_ddp(rank):
    def run(callbacks):
        torch.manual_seed(0)
        model = Uneven()
        model.blocks[1].attn.how = "hidden"
        return _fit(rank, model, callbacks, DDPStrategy(process_group_backend="gloo"))

    watched, keeper = run([AttentionEntropyMonitor(every_n_steps=2, rows=LENGTH)])
    everyone = _same_everywhere((keeper.points, watched.seen))
    assert repr(everyone[0][0]) == repr(everyone[1][0])
    for step in (1, 3, 5, 7):
        pairs = [seen[step] for _, seen in everyone]
        query, key = (torch.cat([pair[i] for pair in pairs]).double() for i in (0, 1))
        expected = attention_entropy(query, key, is_causal=True)
        found = {p.key.rpartition("/")[2]: p.value for p in keeper.points if p.step == step and "blocks.0." in p.key}
        assert found["entropy_mean"] == pytest.approx(expected.normalized.mean().item(), rel=1e-5)
        assert found["entropy_min"] == pytest.approx(expected.normalized.amin().item(), rel=1e-5)
        assert found["n"] == expected.rows[0] == 13 * (LENGTH - 1)
    late = keeper.curve("attention/blocks.1.attn/n")
    assert [(point.step, point.value) for point in late] == [(5, 5 * (LENGTH - 1)), (7, 5 * (LENGTH - 1))]
    plain, _ = run([])
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())


def _check_fsdp(rank):
    def run(callbacks):
        torch.manual_seed(0)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        model, keeper = _fit(rank, Sharded(), callbacks, strategy)
        shards = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        return [shard.detach().clone() for shard in shards], keeper

    watched, keeper = run(
        [AttentionEntropyMonitor(every_n_steps=4, rows=LENGTH), AttentionGainMonitor(every_n_steps=4)]
    )
    plain, _ = run([])
    assert all(map(torch.equal, watched, plain))
    everyone = _same_everywhere(keeper.points)
    assert repr(everyone[0]) == repr(everyone[1])
    points = keeper.curve("attention/encoder.layers.1.self_attn/entropy_mean")
    assert [(point.step, point.n) for point in points] == [(step, 16 * LENGTH) for step in (0, 3, 7)]
    assert all(0.5 < point.value < 1 for point in points)
    gains = keeper.curve("attention/encoder.layers.1.self_attn/low_pass_gain")
    assert [(point.step, point.n) for point in gains] == [(step, 16 * HEADS) for step in (0, 3, 7)]


def _check_metric(rank):
    generator = torch.Generator().manual_seed(0)
    query, key = (2 * torch.randn(7, 4, 20, 8, generator=generator) for _ in range(2))
    metric, whole = AttentionEntropy(num_heads=4), AttentionEntropy(num_heads=4, sync_on_compute=False)
    part = slice(5, 7) if rank else slice(0, 5)
    metric.update(query[part], key[part])
    whole.update(query, key)
    torch.testing.assert_close(metric.compute(), whole.compute(), rtol=1e-10, atol=0)
    with metric.sync_context():
        for state in ("count", "squares", "lowest", "histogram"):
            torch.testing.assert_close(getattr(metric, state), getattr(whole, state), rtol=1e-6, atol=1e-9)


def _check_all(rank):
    _check_ddp(rank)
    _check_metric(rank)
    _check_fsdp(rank)


def test_two_processes():
    on_two_processes(_check_all)
