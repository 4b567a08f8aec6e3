"""Two processes with uneven batches and different classes draw the neural collapse of all their rows."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_collapse import NeuralCollapseMonitor
from lightning_collapse.metrics.neural_collapse import measures
from lightning_collapse.spectral.class_moments import ClassMoments
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.body(x)
        self.seen.append((features.detach().clone(), y))
        return nn.functional.cross_entropy(self.head(features), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Sharded(Classifier):
    def configure_model(self):
        for part in (self.body, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _check(rank, model, strategy):
    torch.manual_seed(0)
    keeper = PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    trainer = Trainer(**options, callbacks=[NeuralCollapseMonitor(every_n_steps=4, rows=60), keeper])
    generator = torch.Generator().manual_seed(rank)
    size = 20 if rank else 30
    labels = [torch.randint(2 * rank, 3 + rank, (size,), generator=generator) for _ in range(4)]  # 0 to 2, and 2 and 3
    batches = [(torch.randn(size, 6, generator=generator) + y[:, None], y) for y in labels]
    lit = model()
    weight = lit.head.weight.detach().clone()
    trainer.fit(lit, DataLoader(batches, batch_size=None))
    window = 60 // size
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, (repr(keeper.points), lit.seen[-window:]))
    assert everyone[0][0] == everyone[1][0]
    whole = ClassMoments(4, 12)
    for _, seen in everyone:
        for features, y in seen:
            whole.update(features, y)
    expected = measures(whole, weight)
    points = {point.key.rpartition("/")[2]: point.value for point in keeper.points}
    assert points["n"] == 120
    assert points["classes"] == 4
    for name in ("nc1", "nc2_equinorm", "nc2_etf", "nc3", "cdnv", "vci"):
        assert points[name] == pytest.approx(expected[name].item(), rel=1e-6), name


def _check_all(rank):
    _check(rank, Classifier, DDPStrategy(process_group_backend="gloo"))
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    _check(rank, Sharded, sharded)


def test_two_processes():
    on_two_processes(_check_all)
