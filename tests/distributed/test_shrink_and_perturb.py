"""Both processes draw the same fresh network, and shards are refused."""

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_collapse import Distillation, ShrinkAndPerturb
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, Toy, batches


class Sharded(Toy):
    def configure_model(self):
        for part in (self.encoder, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, batch):
        return self.head(self.encoder(batch))


def _fit(rank, model, callback, strategy):
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    Trainer(**options, callbacks=[callback]).fit(model, batches(seed=rank))


def _check(rank):
    torch.manual_seed(rank)  # a run whose processes draw different numbers
    model, callback = Toy(), ShrinkAndPerturb()
    for _ in range(2):
        _fit(rank, model, callback, DDPStrategy(process_group_backend="gloo"))
    assert callback.state_dict()["times"] == 1
    weights = [None, None]
    dist.all_gather_object(weights, {name: p.detach() for name, p in model.named_parameters()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    for callback in (ShrinkAndPerturb(), Distillation()):
        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        with pytest.raises(MisconfigurationException, match="no process holds the whole of a sharded one"):
            _fit(rank, Sharded(), callback, sharded)


def test_two_processes():
    on_two_processes(_check)
