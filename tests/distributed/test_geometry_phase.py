"""Two processes with uneven batches draw the geometry of all their sequences together."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_collapse import GeometryPhaseMonitor
from lightning_collapse.functional import eigenvalue_effective_rank, rankme
from lightning_collapse.spectral import singular_values
from lightning_collapse.utilities.features import evenly
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper


class Language(LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 12), nn.Linear(12, 20)
        self.seen = []

    def training_step(self, batch, batch_idx):
        features = self.body(batch)
        self.seen.append(features[:, -1].detach().clone())
        return self.head(features).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Sharded(Language):
    def configure_model(self):
        for part in (self.body, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _check(rank, model, strategy, rows):
    torch.manual_seed(0)
    keeper = PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    trainer = Trainer(**options, callbacks=[GeometryPhaseMonitor(every_n_steps=4, rows=rows), keeper])
    generator = torch.Generator().manual_seed(rank)
    size = 5 if rank else 8
    batches = [torch.randn(size, 3, 12, generator=generator) + rank for _ in range(4)]
    lit = model()
    trainer.fit(lit, DataLoader(batches, batch_size=None))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, (repr(keeper.points), lit.seen))
    assert everyone[0][0] == everyone[1][0]
    points = {point.key.rpartition("/")[2]: point for point in keeper.points}
    # each process keeps its half, from as few batches as hold it where they are largest
    rows_per_batch, last = rows // 2, -(-(rows // 2) // 8)
    per_batch = -(-rows_per_batch // last)
    pool = torch.cat([evenly(part, per_batch) for _, seen in everyone for part in seen[-last:]]).double()
    assert points["n"].value == len(pool)
    assert points["rankme"].value == pytest.approx(rankme(singular_values(pool, center=False)).item(), rel=1e-4)
    expected = eigenvalue_effective_rank(singular_values(pool)).item()
    assert points["eigenvalue_effective_rank"].value == pytest.approx(expected, rel=1e-4)


def _check_all(rank):
    for rows in (10, 32):  # fewer than features: gathered; more: moments
        _check(rank, Language, DDPStrategy(process_group_backend="gloo"), rows)
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    _check(rank, Sharded, sharded, 32)


def test_two_processes():
    on_two_processes(_check_all)
