"""Two processes with uneven batches draw the regression collapse and the intrinsic dimension of all their rows."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_collapse import IntrinsicDimensionMonitor, RegressionCollapseMonitor
from lightning_collapse.functional import two_nn
from lightning_collapse.metrics import IntrinsicDimension, RegressionCollapse
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper


class Regressor(LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.body(x)
        self.seen.append((features.detach().clone(), y))
        return (self.head(features) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Sharded(Regressor):
    def configure_model(self):
        for part in (self.body, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _check(rank, model, strategy):
    torch.manual_seed(0)
    keeper = PointKeeper()
    monitors = [RegressionCollapseMonitor(every_n_steps=4, rows=400)]
    monitors.append(IntrinsicDimensionMonitor(["body"], every_n_steps=4, rows=400, k=5))
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    trainer = Trainer(**options, callbacks=[*monitors, keeper])
    generator = torch.Generator().manual_seed(rank)
    size = 20 if rank else 30
    batches = [(torch.randn(size, 6, generator=generator), torch.randn(size, 3, generator=generator)) for _ in range(4)]
    lit = model()
    weight = lit.head.weight.detach().clone()
    trainer.fit(lit, DataLoader(batches, batch_size=None))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, (repr(keeper.points), lit.seen))
    assert everyone[0][0] == everyone[1][0]
    rows = [row for _, seen in everyone for row in seen]
    features, targets = (torch.cat([row[i] for row in rows]) for i in (0, 1))
    points = {point.key: point.value for point in keeper.points}
    assert points["regression_collapse/head/n"] == points["intrinsic_dimension/body/n"] == 200
    mine = RegressionCollapse(12, 3)
    for of_features, of_targets in lit.seen:  # of this process: the metric asks the other
        mine.update(of_features, of_targets)
    alone = RegressionCollapse(12, 3, sync_on_compute=False)
    alone.update(features, targets)
    expected, together = alone.compute(weight), mine.compute(weight)
    for name in ("nrc1", "nrc2", "nrc3"):
        assert together[name].item() == pytest.approx(expected[name].item(), rel=1e-9), name
        assert points[f"regression_collapse/head/{name}"] == pytest.approx(expected[name].item(), rel=1e-6), name
    dimension = two_nn(features.double()).dimension.item()
    assert points["intrinsic_dimension/body/two_nn"] == pytest.approx(dimension, rel=1e-6)
    metric = IntrinsicDimension(k=5)
    for of_features, _ in lit.seen:
        metric.update(of_features)
    found = metric.compute()
    assert found["n"] == 200
    assert found["two_nn"].item() == pytest.approx(dimension, rel=1e-6)


def _check_all(rank):
    _check(rank, Regressor, DDPStrategy(process_group_backend="gloo"))
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    _check(rank, Sharded, sharded)


def test_two_processes():
    on_two_processes(_check_all)
