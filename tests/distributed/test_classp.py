"""CLASSP on shards: every process moves its own, and together they are the whole."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_collapse.optimizers import CLASSP
from tests.distributed.launch import on_two_processes


def _check(rank):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weight, grads = torch.randn(5, 3), torch.randn(4, 5, 3)
    for power in (1.0, 2.0, 3.0):
        whole = nn.Parameter(weight.clone())
        shard = nn.Parameter(distribute_tensor(weight.clone(), mesh, [Shard(0)]))
        optimizers = [CLASSP([p], lr=0.1, threshold=0.2, power=power) for p in (whole, shard)]
        for grad in grads:
            whole.grad, shard.grad = grad.clone(), distribute_tensor(grad.clone(), mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(shard.full_tensor(), whole)
        assert not torch.equal(whole, weight)
        total = optimizers[1].state[shard]["sum"]
        assert torch.equal(total.full_tensor(), optimizers[0].state[whole]["sum"])
    dist.destroy_process_group()


def test_two_processes():
    on_two_processes(_check)
