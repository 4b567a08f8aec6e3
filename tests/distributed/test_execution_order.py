"""Processes that skip different layers choose the same ones: those that ran on the first."""

import torch
import torch.distributed as dist
from torch import nn

from lightning_collapse.monitoring import ExecutionOrder
from tests.distributed.launch import on_two_processes


def _check(rank):
    dist.init_process_group("gloo")
    net = nn.ModuleDict({"late": nn.Linear(4, 4), "early": nn.Linear(4, 4)})
    order = ExecutionOrder(net)
    order.armed = True
    for name in ("early", "late")[: 2 - rank]:
        net[name](torch.zeros(2, 4))
    assert order.pop().order == ("early", "late")
    dist.destroy_process_group()


def test_two_processes():
    on_two_processes(_check)
