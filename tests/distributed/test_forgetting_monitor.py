"""Two processes, with whole weights and with shards, draw how far the whole weights have moved."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_collapse import ForgettingMonitor
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper, Toy


class Uneven(Toy):
    """Layers that do not halve."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 8))


class Sharded(Uneven):
    def configure_model(self):
        for part in (self.encoder[0], self.encoder[2], self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _check(rank):
    for model in (Uneven, Sharded):
        if model is Uneven:
            strategy = DDPStrategy(process_group_backend="gloo")
        else:
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        keeper, monitor = PointKeeper(), ForgettingMonitor()
        options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
        torch.manual_seed(0)
        lit = model()
        before = {name: value.detach().clone() for name, value in lit.named_parameters()}
        data = torch.randn(12, 16, generator=torch.Generator().manual_seed(rank))
        Trainer(**options, callbacks=[monitor, keeper]).fit(lit, DataLoader(data, batch_size=4))
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, repr(keeper.points))
        assert everyone[0] == everyone[1]
        after = {name: _full(value) for name, value in lit.named_parameters()}
        for layer in ("encoder.0", "encoder.2", "head"):
            change = torch.cat([(after[f"{layer}.{n}"] - before[f"{layer}.{n}"]).flatten() for n in ("weight", "bias")])
            for kind in ("epoch_change", "task_change"):
                [point] = keeper.curve(f"continual/{layer}/{kind}")
                assert 0 < point.value == pytest.approx(change.abs().mean().item(), rel=1e-5)
        state = monitor.state_dict()["of_task"]
        assert all(torch.equal(state[name], after[name]) for name in after)
        torch.distributed.barrier()


def _full(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()


def test_two_processes():
    on_two_processes(_check)
