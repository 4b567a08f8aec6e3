"""Processes whose batches say different things agree on what the first one has read."""

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_collapse.callbacks.loss_reader import LossReader
from lightning_collapse.utilities.containment import Containment
from tests.distributed.launch import on_two_processes


def _check(rank):
    dist.init_process_group("gloo")
    module = LightningModule()
    module.net = nn.Linear(4, 3)
    reader = LossReader(module, Containment("CollapseGuard"))
    x, y, z = torch.randn(6, 4), torch.arange(6) % 3, torch.randn(6, 3)
    module.training_step = lambda batch: cross_entropy(module.net(x), y) if rank == 0 else mse_loss(module.net(x), z)
    reader.before_batch((x, y, z))
    reader.before_backward(module.training_step((x, y, z)))
    assert (reader.use.task, reader.use.compared) == ("classification", ("net",))
    dist.destroy_process_group()


def test_two_processes():
    on_two_processes(_check)
